"""Half-quadratic quantisation: scales and zero points for the least sum of |w - w^|^p, p < 1, without data.

A power below 1 lets a few weights be far off where that brings the many closer, so large weights do not stretch the grid
of their group. The objective has no derivative to follow, and is split into two steps that have closed forms:

    e = shrink(w - w^) = sign(r) relu(|r| - |r|^(p-1) / beta),  r = w - w^        what the group gives up on
    s, z = least squares of the codes to w - e                                    z to the integers on both sides of it

with beta growing at every turn. Shapes: groups [n, size], scales and zero points [n, 1].

The project hqq moves the zero point alone, keeps it in fp16, and measures r in units of the weights: with its beta of
10 anything below 0.17 is shrunk to nothing, which for most models is everything. Here r is in units of the step, so that
the same defaults mean the same for every weight, the scale is refitted as well, and the zero point is the integer that
is stored. A symmetric format has its scale alone. Each group keeps the best grid that it met, those of both kinds of
round-to-nearest among them, so the objective is never worse than theirs.

Left to itself the scale falls until the large weights are given up: at int4_asym, of normal weights with 2 % of outliers
five times as large, |w - w^| / |w| is 0.228 instead of 0.123 while the objective falls by 6 %. So the scale stays above
`reach` times that of the start.

Fine zero points (int4_fine) are fitted otherwise. Counted in fractions they follow least squares, and what decides then is
whether 0 lies on the grid: where steps are wide, most weights are less than one from it, and small weights meet large
inputs, since norms before them were folded into them or could have been. So an error counts the more the smaller its
weight, by the power once more,

    m = (|w| / s + 1/4)^(p - 2)        z <- sum m (q - w / s) / sum m        least sum m (w - w^)^2

from the zero point that covers the group and from the whole ones on both sides of it, with the scale that covers it. Mean
KL of the reference model (4 windows of each text) of the same starts judged by the plain squared error and by m:
int4_fine_channel 0.910 and 0.746, int4_fine_g64 0.299 and 0.279 (m to the power -1.5); from the covering zero point alone,
judged plainly, int4_fine_channel has 1.356. Where one zero point serves a whole row, the whole ones that the turns above find
are better yet, and are taken: over 48 windows 0.728 instead of 0.751.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product

import torch

from lowbit.algorithms.statistics import Statistics
from lowbit.algorithms.table import Rounded
from lowbit.errors import RecipeError
from lowbit.formats import Format
from lowbit.grid import (
    Grid,
    ScaleRounder,
    fit_grid,
    from_codes,
    group_weight,
    pack,
    scale_rounder,
    store_grid,
    to_codes,
)
from lowbit.grid_points import round_zeros
from lowbit.options import HqqOptions
from lowbit.packing import PackedTensor
from lowbit.search import PLAIN, Search

_DEFAULTS = HqqOptions()
Fit = tuple[torch.Tensor, torch.Tensor | None]
Loss = Callable[[Fit], torch.Tensor]
# Fine zero points: weights below so many steps count alike, and so much of an error is worth another turn.
_FLOOR = 0.25
_WORTH = 0.999
# Shares of the scale that are tried at 2 bits; elsewhere large weights are not to be cut off, which m would allow: with these
# int4_fine_g64 has a KL of 0.586 instead of 0.277, int2_fine_g64 has 6.9 instead of 9.7.
_SHARES = (1.0, 0.9, 0.8)
_SHARED_BITS = 2


def round_hqq(weight: torch.Tensor, format: Format, options: HqqOptions = _DEFAULTS) -> PackedTensor:
    """Pack a weight [.., out, in]."""
    if format.kind == "kquant":
        raise RecipeError(f"hqq cannot fit {format}, whose scales lie inside its blocks: take rtn, or an int format")
    groups, mask = group_weight(weight, format)
    rounder = scale_rounder(weight, format)
    if format.fine_zeros and format.group_size > 0:
        starts = [fit_grid(weight, format)]
        plain = _by_group(starts[0], len(groups))
        loss: Loss = partial(weighted_error, groups, near_zero(groups, mask, plain[0], options.power), format)
        best = _settle(groups, mask, rounder, plain, options)
    else:
        starts = [fit_grid(weight, replace(format, fine_zeros=False), search) for search in (PLAIN, Search())]
        loss = partial(objective, groups, mask, format, power=options.power)
        found = [_descend(groups, mask, rounder, _by_group(start, len(groups)), options) for start in starts]
        best = _choose(loss(found[0]) < loss(found[1]), found[0], found[1])
    grid = store_grid(tuple(weight.shape), groups, *best, rounder)
    if format.scale_block:
        # A second level of scales is fitted to all groups at once, and may undo what each of them gained alone.
        grid = min([grid, *starts], key=lambda grid: float(loss(_by_group(grid, len(groups))).sum()))
    return pack(weight, format, grid)


def round_half_quadratic(
    weight: torch.Tensor, format: Format, statistics: Statistics | None, options: HqqOptions
) -> Rounded:
    """The row `hqq`."""
    return Rounded(round_hqq(weight, format, options))


def objective(groups: torch.Tensor, mask: torch.Tensor, format: Format, fit: Fit, power: float) -> torch.Tensor:
    """sum |w - w^|^p of each group: [groups, 1]."""
    return (mask * (groups - _rounded(groups, format, fit))).abs().pow(power).sum(dim=-1, keepdim=True)


def near_zero(groups: torch.Tensor, mask: torch.Tensor, scales: torch.Tensor, power: float) -> torch.Tensor:
    """m: what an error counts, the more the smaller the weight."""
    return mask * ((groups / scales).abs() + _FLOOR).pow(power - 2)


def weighted_error(groups: torch.Tensor, weights: torch.Tensor, format: Format, fit: Fit) -> torch.Tensor:
    """sum m (w - w^)^2 of each group: [groups, 1]."""
    return (weights * (groups - _rounded(groups, format, fit)).square()).sum(dim=-1, keepdim=True)


def _settle(groups: torch.Tensor, mask: torch.Tensor, rounder: ScaleRounder, start: Fit, options: HqqOptions) -> Fit:
    """The best zero points on the way from that of the start and from the whole ones beside it, at several scales."""
    format, (plain, zeros) = rounder.format, start
    assert zeros is not None
    weights = near_zero(groups, mask, plain, options.power)
    total = weights.sum(dim=-1, keepdim=True)
    best, least = start, weighted_error(groups, weights, format, start)
    shares = _SHARES if format.bits == _SHARED_BITS else _SHARES[:1]
    for share, first in product(shares, (zeros, zeros.floor(), zeros.ceil().clamp_max(format.max_code))):
        fit, before = (rounder(plain * share), first), math.inf
        for _ in range(options.iterations + 1):
            error = weighted_error(groups, weights, format, fit)
            best, least = _choose(error < least, fit, best), torch.minimum(error, least)
            now = float(error.sum())
            if not now < before * _WORTH:
                break
            rest = to_codes(groups, format, *fit) - groups / fit[0]
            fit, before = (fit[0], round_zeros((weights * rest).sum(dim=-1, keepdim=True) / total, format)), now
    return best


def _descend(groups: torch.Tensor, mask: torch.Tensor, rounder: ScaleRounder, start: Fit, options: HqqOptions) -> Fit:
    """The best grid of each group on the way from the start, which ends where a turn betters none of them."""
    format, beta, fit = rounder.format, options.beta, start
    best, least = start, objective(groups, mask, format, start, options.power)
    for _ in range(options.iterations):
        codes, step = to_codes(groups, format, *fit), fit[0].abs()
        rest = (groups - from_codes(codes, format, *fit)) / step
        goal = groups - mask * _shrink(rest, options.power, beta) * step
        zeros = [None] if fit[1] is None else _zeros(codes, goal, mask, fit, format.max_code)
        offers = [_fit_scale(codes, goal, mask, (fit[0], zero), rounder) for zero in zeros]
        offers = [(_within_reach(scales, start[0] * options.reach, rounder), zero) for scales, zero in offers]
        errors = [objective(groups, mask, format, offer, options.power) for offer in offers]
        # Of the integers on both sides of the best zero point the better one goes on.
        fit, error = offers[0], errors[0]
        if len(offers) > 1:
            fit, error = _choose(errors[0] <= errors[1], offers[0], offers[1]), torch.minimum(*errors)
        better = error < least
        if not bool(better.any()):
            break
        best, least = _choose(better, fit, best), torch.where(better, error, least)
        beta *= options.growth
    return best


def _shrink(rest: torch.Tensor, power: float, beta: float) -> torch.Tensor:
    size = rest.abs()
    return rest.sign() * (size - size.clamp_min(1e-8).pow(power - 1) / beta).clamp_min(0)


def _fit_scale(codes: torch.Tensor, goal: torch.Tensor, mask: torch.Tensor, fit: Fit, rounder: ScaleRounder) -> Fit:
    """The scale of least squares for codes and zero points that are given."""
    values = mask * from_codes(codes, rounder.format, torch.ones_like(fit[0]), fit[1])
    square = values.square().sum(dim=-1, keepdim=True)
    scales = torch.where(square > 0, (values * goal).sum(dim=-1, keepdim=True) / square.clamp_min(1e-30), fit[0])
    return rounder(torch.where(scales != 0, scales, fit[0])), fit[1]


def _within_reach(scales: torch.Tensor, least: torch.Tensor, rounder: ScaleRounder) -> torch.Tensor:
    return torch.where(scales.abs() < least.abs(), rounder(least), scales)


def _zeros(
    codes: torch.Tensor, goal: torch.Tensor, mask: torch.Tensor, fit: Fit, largest_code: int
) -> list[torch.Tensor | None]:
    """The integers on both sides of the zero point with which a line through the codes fits best."""
    count = mask.sum(dim=-1, keepdim=True)
    mean_code = (mask * codes).sum(dim=-1, keepdim=True) / count
    mean_goal = (mask * goal).sum(dim=-1, keepdim=True) / count
    offsets = mask * (codes - mean_code)
    slope = (offsets * goal).sum(dim=-1, keepdim=True) / offsets.square().sum(dim=-1, keepdim=True).clamp_min(1e-30)
    zero = mean_code - mean_goal / torch.where(slope > 0, slope, fit[0])
    return [side.clamp(0, largest_code) for side in (zero.floor(), zero.ceil())]


def _choose(first: torch.Tensor, one: Fit, other: Fit) -> Fit:
    """Group by group one fit or the other."""
    zeros = None if one[1] is None or other[1] is None else torch.where(first, one[1], other[1])
    return torch.where(first, one[0], other[0]), zeros


def _by_group(grid: Grid, count: int) -> Fit:
    return grid.scales.reshape(count, 1), None if grid.zeros is None else grid.zeros.reshape(count, 1)


def _rounded(groups: torch.Tensor, format: Format, fit: Fit) -> torch.Tensor:
    return from_codes(to_codes(groups, format, *fit), format, *fit)
