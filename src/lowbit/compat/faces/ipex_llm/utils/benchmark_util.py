"""`BenchmarkWrapper`: a model whose `generate` notes how long the first and the later tokens took.

model = BenchmarkWrapper(model, do_print=True)
model.generate(ids, max_new_tokens=32)
model.first_cost, model.rest_cost_mean        seconds; model.peak_memory in GB: of the device, or of this process on a CPU
"""

from __future__ import annotations

import statistics
from itertools import pairwise
from typing import Any

import torch

from lowbit.bench import peak_memory
from lowbit.bridge import timed_generate
from lowbit.compat.missing import refuse_unknown

_GB = 1024**3


class BenchmarkWrapper:
    """Stands for the model it wraps; all but `generate` is the model's own."""

    def __init__(self, model: Any, do_print: bool = False, verbose: bool = False) -> None:
        self.model, self.do_print, self.verbose = model, do_print, verbose
        self.encoder_time = self.first_cost = self.rest_cost_mean = self.peak_memory = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["model"], name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The model's `generate`, timed."""
        out, seconds = timed_generate(self.model, *args, **kwargs)
        self.peak_memory = _memory_in_use(self.model) / _GB
        self.first_cost = seconds[0] if seconds else 0.0
        rest = [later - earlier for earlier, later in pairwise(seconds)]
        self.rest_cost_mean = statistics.fmean(rest) if rest else 0.0
        if self.do_print:
            print(f"First token: {self.first_cost:.4f} s, peak memory {self.peak_memory:.2f} GB")
            if rest:
                print(f"Later tokens: {self.rest_cost_mean:.4f} s each ({len(rest)} of them)")
            if self.verbose:
                print("Each later token: " + ", ".join(f"{gap:.4f}" for gap in rest) + " s")
        return out


def _memory_in_use(model: Any) -> int:
    device = torch.device(getattr(model, "device", "cpu"))
    if device.type in ("cuda", "xpu"):
        return int(getattr(torch, device.type).max_memory_reserved(device))
    return peak_memory()


__getattr__ = refuse_unknown(__name__, {})
