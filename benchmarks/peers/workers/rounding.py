"""The conversation of a worker that rounds models with the benchmark of quality: a line of JSON in, a line out.

    {"settings": {"algorithm": "gptq", "bits": 4, "group": 64, ...}, "out": "weights.safetensors"}
    -> {"seconds": 12.3, "host_bytes": 2100000000, "device_bytes": 900000000, "zero_bits": 0}

A worker runs in its project's environment and needs torch, safetensors and the project. It rounds the linears of the
blocks and nothing else, and writes every weight of the blocks and the last norm as it would be read back, in float32.
Seconds and the peaks of memory are those of the rounding, model and tokens loaded already, caches of the device emptied.
On standard output nothing but the answers may appear, so what a project prints goes to standard error: from its import on,
which is why this module is imported first.
"""

import argparse
import contextlib
import gc
import json
import os
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from serve import peak_bytes

SEED = 42
KEPT = ("embed_tokens", "lm_head")
ANSWERS = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)


class Meter:
    """`with meter:` around the rounding and nothing else."""

    def __init__(self, device):
        self.device, self.facts = device, {}

    def __enter__(self):
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
        with contextlib.suppress(OSError):  # the peak of the resident set begins anew
            Path("/proc/self/clear_refs").write_text("5")
        self.start = time.perf_counter()
        return self

    def __exit__(self, *_):
        if self.device == "cuda":
            torch.cuda.synchronize()
        self.facts = {"seconds": time.perf_counter() - self.start, "host_bytes": peak_bytes(), "device_bytes": 0}
        if self.device == "cuda":
            self.facts["device_bytes"] = torch.cuda.max_memory_allocated()


def load_model(folder, device, dtype=torch.float32):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()


def dense_weights(model):
    """Every floating parameter of a model that was rounded in place."""
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.is_floating_point()}


def blocks_only(weights):
    """What a worker writes: the embedding and the head stay as they were in every row."""
    chosen = {name: weight for name, weight in weights.items() if not any(word in name for word in KEPT)}
    return {name: weight.detach().float().cpu().contiguous() for name, weight in chosen.items()}


def warm_up(device):
    """What a device does once is none of the first row's business."""
    x = torch.eye(64, device=device)
    torch.linalg.cholesky(x + x @ x)
    if device == "cuda":
        torch.cuda.synchronize()


def serve(round_model):
    """`round_model(settings, given, tokens, meter)` gives a state dict and more facts; `given` has `model`, `device`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("tokens")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    tokens = load_file(given.tokens)["tokens"]
    warm_up(given.device)
    for line in sys.stdin:
        asked = json.loads(line)
        torch.manual_seed(SEED)
        meter = Meter(given.device)
        weights, facts = round_model(asked["settings"], given, tokens, meter)
        save_file(blocks_only(weights), asked["out"])
        weights = None
        print(json.dumps(meter.facts | facts), file=ANSWERS, flush=True)
