"""Do the graphs of a pipeline of pictures answer as the modules of diffusers that they come from?

Each part by itself, called as it was while it was followed, with a line for each device and setting: a picture is made of dozens of
calls, and noise hides which of them is wrong. Where the export rounded a plain part nothing can be exact: then all devices have to
say what the folder says in f32 on the first one, and what that is away from the source is the rounding's part. Divergence is the
squared error of what a part gives beside its square.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lowbit.errors import LowbitError
from lowbit.openvino.comparison import EXACT_LIMIT, SETTINGS, Floats, Row, Verification, exact_settings
from lowbit.openvino.compress import is_compressed
from lowbit.openvino.diffusion import OVDiffusionPipeline
from lowbit.openvino.library import device, devices
from lowbit.openvino.picture_export import fetch
from lowbit.openvino.picture_parts import calls_of


def verify_pipeline(
    folder: str | Path, source: Any, keywords: Mapping[str, Any], on: Iterable[str] | None = None
) -> Verification:
    """Compare the folder of a pipeline with the one that it was exported from, on the devices named or on all that are here."""
    chosen = devices() if on is None else [device(name) for name in on]
    original = fetch(source, keywords).to(torch.float32)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        calls = {name: call for name, (_, call) in calls_of(original).items()}
    inputs = {name: call.inputs for name, call in calls.items()}
    truth = {name: _flat(call.answer()) for name, call in calls.items()}
    del original, calls
    rows, moved = [], dict[str, float]()
    for place in chosen:
        for setting in SETTINGS:
            settings = exact_settings(place) if setting == "exact" else {}
            made = OVDiffusionPipeline._open(Path(folder), compile=False, device=place, ov_config=settings)
            for name, given in inputs.items():
                part, started = made.parts[name], time.perf_counter()
                called = f"{place}, {name}"
                try:
                    said = _flat(part.run(**given))
                except (LowbitError, RuntimeError) as error:
                    rows.append(Row(called, setting, error=str(error)))
                    continue
                part.compiled_graph = None  # the next one has its room
                if name not in moved and setting == SETTINGS[0] and is_compressed(part.model):
                    moved[name], truth[name] = _away(truth[name], said), said
                    continue
                seconds = time.perf_counter() - started
                away = _away(truth[name], said)
                rows.append(Row(called, setting, _largest(truth[name], said), away, limit=EXACT_LIMIT, seconds=seconds))
    return Verification(tuple(rows), max(moved.values()) if moved else None)


def _flat(tensors: Mapping[str, torch.Tensor]) -> Floats:
    """All that a part gives, in the order of the names."""
    return np.concatenate([np.asarray(tensors[name].float().numpy()).ravel() for name in sorted(tensors)])


def _largest(truth: Floats, said: Floats) -> float:
    if truth.shape != said.shape:
        return float("inf")
    return float(np.abs(said - truth).max() / (np.abs(truth).max() or 1.0))


def _away(truth: Floats, said: Floats) -> float:
    if truth.shape != said.shape:
        return float("inf")
    return float(np.square(said - truth).sum() / (np.square(truth).sum() or 1.0))
