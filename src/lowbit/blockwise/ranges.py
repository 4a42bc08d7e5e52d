"""Ranges: between what ends the inputs of a linear lie, for formats that round activations to a fixed range (w8a8_static).

    range = [min(0, least x), max(0, largest x)]        over all calibration tokens, out of blocks that are rounded already

A scaler that goes before (smoothquant) has taken outliers into the weights, so the ends are taken as they are. A linear that no
token reached, or that saw nothing but zeros, has no range: each row of its input keeps a scale of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from lowbit.blockwise.inputs import first_given
from lowbit.layers import PackedWeight
from lowbit.models.capture import Call, watch_calls
from lowbit.report import LayerReport

_UNSEEN = "no token reached it, or nothing but zeros, so each row of its input has its own scale"


def fix_ranges_(
    block: nn.Module, name: str, calls: Sequence[Call], packed: dict[str, list[PackedWeight]], rows: list[LayerReport]
) -> None:
    """Give each packed weight whose format asks for it the range of its inputs over all calls, and say so in its line."""
    paths = [path for path, weights in packed.items() if weights[0].format.fixed_range]
    found = input_ranges(block, calls, paths) if paths else {}
    lines = {row.path: row for row in rows}
    for path in paths:
        (weight,), row = packed[path], lines[f"{name}.{path}"]
        if path in found and bool(found[path].any()):
            weight.set_packed_(replace(weight.packed(), input_range=found[path]))
            note = "inputs from {:.4g} to {:.4g}".format(*found[path].tolist())
        else:
            weight.set_packed_(replace(weight.packed(), format=weight.format.unfixed))
            row.format, note = weight.format.name, _UNSEEN
        row.note = "; ".join(text for text in (row.note, note) if text)


@torch.no_grad()
def input_ranges(block: nn.Module, calls: Sequence[Call], paths: Sequence[str]) -> dict[str, torch.Tensor]:
    """The lowest and the highest input [2] of modules that run, by path; nothing is ever above 0 or below it alone."""
    found: dict[str, torch.Tensor] = {}
    modules = {path: block.get_submodule(path) for path in paths}
    for seen in watch_calls(block, calls, modules.values()):
        for path, module in modules.items():
            for x in map(first_given, seen.given.get(module, ())):
                if x.numel():
                    ends = torch.stack([x.amin().float().clamp_max(0), x.amax().float().clamp_min(0)])
                    known = found.get(path, ends)
                    found[path] = torch.stack([torch.minimum(known[0], ends[0]), torch.maximum(known[1], ends[1])])
    return found
