"""The search for scales that `search.Search` asks for: many are tried for each group, and the one with the least error is kept.

Candidates are the plain scale r0 and, for `steps` ratios r evenly spaced from
`lowest` to `highest`,

    symmetric    r * extreme / -2^(b-1)  and  r * extreme / (2^(b-1) - 1)         (the largest weight at either end)
    asymmetric   r * (high - low) / (2^b - 1), each with z = round(-low r / s) - zero_steps .. + zero_steps
    fine zeros   the same, z rounded to what its byte counts and moved by a quarter of a code at a time
    codebooks    r * |extreme| / max level

Each is refitted by least squares to the codes it gives, s = sum(m w q) / sum(m q^2), rounded to the stored type, and the
first with the least sum(m (s q - w)^2) is kept. m is the importance of the input where one is given, else sqrt|w|:
without data, least squares alone clips the large weights of a group, which costs the model more than it saves. Mean KL
of int4_g64 over three drafts of the reference model: plain 0.446, m = 1 0.431, sqrt|w| 0.402, |w| 0.434; of its tied
head at int5_g64: plain 0.034, m = 1 0.052, sqrt|w| 0.038. Least squares for a power other than 2, a scale that keeps
the energy of the group, a second refit and 32 or 64 steps gave nothing beyond that. It needs arithmetic only;
`benchmarks/default_format.py` shows its worth. Without `refit` the candidates are taken as they are, and m = 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache

import torch

from lowbit.formats import Format
from lowbit.grid_points import code_values, nearest_codes, round_zeros
from lowbit.search import Search

# fp16 cannot hold a scale below this; groups that small are stored as zeros.
TINY_SCALE = 6e-8
# Candidates are tried together on a GPU, up to so many numbers; a CPU likes them one by one, in its cache.
_TRIED_AT_ONCE = 1 << 23
# How far a fine zero point is moved at a time, in codes.
_FINE_MOVE = 0.25

# Scales and zero points: [groups, 1], or of several candidates [candidates, groups, 1].
Grids = tuple[torch.Tensor, torch.Tensor | None]


@dataclass(frozen=True)
class Groups:
    """A weight in groups [groups, size], what the error of each of its numbers counts, and the format that they get."""

    weight: torch.Tensor
    counts: torch.Tensor
    format: Format


def extremes(groups: torch.Tensor) -> torch.Tensor:
    """The entry of the largest magnitude of each group, with its sign: [groups, 1]."""
    index = groups.abs().argmax(dim=-1, keepdim=True)
    return groups.gather(-1, index)


def candidates(groups: torch.Tensor, format: Format, search: Search) -> Grids:
    """Scales (and zero points) to try, before rounding to the stored type: [candidates, groups, 1].

    They are made all at once: on a GPU forty tensors of one number for each group take longer than rounding by them.
    """

    def column(values: Iterable[float]) -> torch.Tensor:
        return _column(tuple(values), groups.device)

    ratios = search.ratios()
    if format.kind == "int" and not format.symmetric:
        low = groups.amin(dim=-1, keepdim=True).clamp_max(0.0)
        high = groups.amax(dim=-1, keepdim=True).clamp_min(0.0)
        scales = (high - low).clamp_min(1e-20) * column(ratio / format.max_code for ratio in ratios)
        middle = round_zeros(-low * column(ratios) / scales, format)
        move = _FINE_MOVE if format.fine_zeros else 1.0
        shifts = column(move * shift for shift in range(-search.zero_steps, search.zero_steps + 1))
        zeros = (middle[:, None] + shifts).clamp(0, format.max_zero)
        return scales[:, None].expand_as(zeros).flatten(0, 1), zeros.flatten(0, 1)
    if format.kind == "int":
        ends = -format.midpoint, format.midpoint - 1
        return extremes(groups) * column(ratio / end for ratio in ratios for end in ends), None
    return extremes(groups).abs() * column(ratio / format.max_level for ratio in ratios), None


@lru_cache(maxsize=64)
def _column(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """Numbers as [n, 1, 1], made once: to bring them to a GPU means waiting for all that it still has to do."""
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=torch.float32, device=device)[:, None, None]


def search_scales(
    groups: Groups, rounder: Callable[[torch.Tensor], torch.Tensor], search: Search, start: Grids
) -> Grids:
    """The best scales (and zero points), the plain ones of the start among those tried. `rounder`: to the stored type."""
    weight, counts, format = groups.weight, groups.counts, groups.format
    best_scales, best_zeros = start
    best_error = torch.full_like(best_scales, torch.inf)
    all_scales, all_zeros = candidates(weight, format, search)
    all_scales = torch.cat([best_scales[None], all_scales])
    all_zeros = None if best_zeros is None or all_zeros is None else torch.cat([best_zeros[None], all_zeros])
    together = 1 if weight.device.type == "cpu" else max(_TRIED_AT_ONCE // weight.numel(), 1)
    for first in range(0, len(all_scales), together):
        scales = all_scales[first : first + together]
        zeros = None if all_zeros is None else all_zeros[first : first + together]
        usable = torch.where(scales.abs() < TINY_SCALE, torch.ones_like(scales), scales)
        values = code_values(nearest_codes(weight, usable, zeros, format), zeros, format)
        product = (counts * values * weight).sum(dim=-1, keepdim=True)
        square = (counts * values * values).sum(dim=-1, keepdim=True)
        refitted = rounder(torch.where(square > 0, product / square, usable) if search.refit else usable)
        error, least = (counts * (refitted * values - weight).square()).sum(dim=-1, keepdim=True).min(dim=0)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scales = torch.where(better, refitted.gather(0, least[None])[0], best_scales)
        if zeros is not None and best_zeros is not None:
            best_zeros = torch.where(better, zeros.gather(0, least[None])[0], best_zeros)
    return best_scales, best_zeros
