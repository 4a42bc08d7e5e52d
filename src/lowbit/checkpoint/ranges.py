"""Ranges of activations beside a saved model, as text: written, read, edited by hand and read again.

    lowbit_activations.json     {"ranges": {"model.layers.0.mlp.down_proj": {"low": -3.25, "high": 4.5}, ...}}

The file is there where a model has layers that round activations to fixed ranges (w8a8_static). What it says holds when the
model is loaded; a layer that it does not name keeps the range that is stored with its weight.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowbit.checkpoint.layout import held_weights
from lowbit.contents import ACTIVATIONS, read_json
from lowbit.errors import CheckpointError, nearest

_ABOUT = "Inputs of these layers are rounded to 256 steps from low to high; what is edited here holds when the model is loaded."


def ranges_of(model: nn.Module) -> dict[str, dict[str, float]]:
    """The range of each layer that has one, by path."""
    found = {}
    for held in held_weights(model):
        ends = held.weight.tensors.get("input_range")
        if ends is not None:
            found[held.path] = dict(zip(("low", "high"), ends.tolist(), strict=True))
    return found


def write_ranges(model: nn.Module, folder: Path) -> None:
    """Write the ranges of a model, if it has any."""
    found = ranges_of(model)
    if found:
        text = json.dumps({"about": _ABOUT, "ranges": found}, indent=1)
        (folder / ACTIVATIONS).write_text(text + "\n", encoding="utf-8")


def read_ranges_(model: nn.Module, folder: Path) -> None:
    """Give the layers of a model the ranges that a folder's file says."""
    path = folder / ACTIVATIONS
    if not path.is_file():
        return
    said = read_json(path).get("ranges")
    if not isinstance(said, dict):
        raise CheckpointError(f'{path} has no "ranges": write {{"ranges": {{LAYER: {{"low": -1.5, "high": 2.0}}}}}}')
    layers = {h.path: h.weight for h in held_weights(model) if "input_range" in h.weight.tensors}
    for name, ends in said.items():
        if name not in layers:
            raise CheckpointError(f"{path} names {name!r}, which has no range in this model: {nearest(name, layers)}")
        weight = layers[name]
        value = torch.tensor(_ends(path, name, ends), device=weight.device)
        weight.set_packed_(replace(weight.packed(), input_range=value))


def _ends(path: Path, name: str, ends: Any) -> tuple[float, float]:
    given = [ends.get(name) for name in ("low", "high")] if isinstance(ends, dict) else []
    numbers = [float(end) for end in given if isinstance(end, int | float) and math.isfinite(end)]
    if len(numbers) != 2 or not numbers[0] <= 0 <= numbers[1] or numbers[0] == numbers[1]:
        raise CheckpointError(
            f"{path} says {ends!r} for {name}: a range has a low of at most 0 and a high of at least 0, and is not empty"
        )
    return numbers[0], numbers[1]
