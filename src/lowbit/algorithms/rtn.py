"""Round to nearest: every weight on its own.

plain_rtn   the scale that covers the group, nothing searched
clip_rtn    that scale shrunk to the least squared error of the group's weights (mse clip)
rtn         the scale of each group searched for the least squared error (see `search.Search`); the default. Where
            calibration tokens are given, the error of an input weighs as much as the mean square of what it gets, and from
            4 bits on the search is wider
"""

from __future__ import annotations

import torch

from lowbit.algorithms.statistics import Statistics
from lowbit.algorithms.table import Rounded
from lowbit.errors import RecipeError
from lowbit.formats import Format
from lowbit.grid import quantize, rounded, unpack
from lowbit.grid_core import core_distance
from lowbit.options import Options, RtnOptions
from lowbit.packing import PackedTensor
from lowbit.search import CLIP, SEARCHES, Search, weighed

# An input that was never seen still counts this share of the mean, so that its weights are not thrown away.
_LEAST_IMPORTANCE = 1e-3


def round_weight(
    weight: torch.Tensor, format: Format, rounder: str = "rtn", importance: torch.Tensor | None = None
) -> PackedTensor:
    """Pack a weight [.., out, in] without data, or by the importance [in] of its inputs.

    Rounders that need data fall back to `rtn` here.
    """
    return quantize(weight, format, _search_for(format, rounder, importance), importance)


def round_by_search(weight: torch.Tensor, format: Format, importance: torch.Tensor | None) -> torch.Tensor:
    """What `rtn` would be read back as, in fp32."""
    return rounded(weight, format, _search_for(format, "rtn", importance), importance)


def _search_for(format: Format, rounder: str, importance: torch.Tensor | None) -> Search:
    search = SEARCHES.get(rounder, Search())
    return search if importance is None or format.kind != "int" else weighed(search, format.bits, format.symmetric)


def round_to_nearest(
    weight: torch.Tensor, format: Format, statistics: Statistics | None, options: RtnOptions
) -> Rounded:
    """The row `rtn`."""
    if statistics is None or statistics.is_blank or not options.importance:
        return Rounded(round_weight(weight, format))
    return Rounded(round_weight(weight, format, importance=importance_of(statistics)))


def round_plain(weight: torch.Tensor, format: Format, statistics: Statistics | None, options: Options) -> Rounded:
    """The row `plain_rtn`."""
    return Rounded(round_weight(weight, format, "plain_rtn"))


def round_clipped(weight: torch.Tensor, format: Format, statistics: Statistics | None, options: Options) -> Rounded:
    """The row `clip_rtn`."""
    if format.kind == "kquant":
        raise RecipeError(
            f"clip_rtn cannot shrink the scales of {format}, which lie inside its blocks: take rtn, or an int format"
        )
    return Rounded(quantize(weight, format, CLIP))


def importance_of(statistics: Statistics) -> torch.Tensor:
    """The mean square of each input [in], none of them nothing."""
    return floored(statistics.mean_square)


def floored(square: torch.Tensor) -> torch.Tensor:
    """Mean squares [in], none of them nothing."""
    return square.clamp_min(square.mean() * _LEAST_IMPORTANCE)


def relative_error(weight: torch.Tensor, packed: PackedTensor) -> float:
    """|w - w^| / |w|."""
    sums = core_distance(weight, packed)
    if sums is None:
        restored = unpack(packed)
        sums = float((weight.float() - restored).square().sum()), float(weight.float().square().sum())
    error, norm = sums
    return (error / norm) ** 0.5 if norm else 0.0
