"""Round to nearest: every weight on its own, no data.

    plain_rtn   the scale that covers the group, nothing searched
    rtn         the scale of each group searched for the least squared error (see `search.Search`); the default

With several formats offered for one weight, the one with the least error is taken.
"""

from __future__ import annotations

import torch

from lowbit.formats import Format
from lowbit.grid import quantize, unpack
from lowbit.grid_core import core_distance
from lowbit.packing import PackedTensor
from lowbit.search import SEARCHES


def round_weight(weight: torch.Tensor, format: Format, rounder: str = "rtn") -> PackedTensor:
    """Pack a weight [.., out, in]."""
    return quantize(weight, format, SEARCHES[rounder])


def round_weight_best(weight: torch.Tensor, formats: tuple[Format, ...], rounder: str) -> PackedTensor:
    """Pack a weight in the format, of those offered, that keeps it best."""
    offers = [round_weight(weight, format, rounder) for format in formats]
    return offers[0] if len(offers) == 1 else min(offers, key=lambda packed: relative_error(weight, packed))


def relative_error(weight: torch.Tensor, packed: PackedTensor) -> float:
    """|w - w^| / |w|."""
    sums = core_distance(weight, packed)
    if sums is None:
        restored = unpack(packed)
        sums = float((weight.float() - restored).square().sum()), float(weight.float().square().sum())
    error, norm = sums
    return (error / norm) ** 0.5 if norm else 0.0
