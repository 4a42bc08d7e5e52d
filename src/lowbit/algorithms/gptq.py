"""GPTQ (arXiv 2210.17323): columns are rounded one after another, and what each loses is made good by those still to come.

    H = 2/n sum x x^T + damping        U^T U = H^-1, U upper triangular
    for each column i:   e = (w_i - w^_i) / U_ii        w_j -= e U_ij   for all j > i

U comes from one Cholesky factor: with the columns reversed H = L L^T, and U is the inverse of L reversed back. A factor
of H drops out of all this, so the sum of x x^T serves as it is. Columns are taken in stretches, of one group or a part of
it; what a stretch owes to the columns behind it is one matrix product.

The scale of a group is fitted when its first column is reached, to the weights as they are by then, with the search of
`search.Search` in which column i counts 1 / U_ii^2: that is what its error costs once the columns behind it have done
what they can. Formats whose scales depend on one another (a second level, one scale for the tensor) have them fixed
beforehand, as `static_groups` does for any.

Order (arXiv 2505.14638): inside a group columns go by falling diag H, and groups by the largest in them. A group keeps
its columns, so that nothing is reordered in what is saved and no gather is needed when the weight is used.

`correction` (GPTAQ, arXiv 2504.02692): the inputs that the linear gets come out of rounded blocks, x instead of x_full.
|W x_full - W^ x| is least where W^ approximates W (1 + C H^-1), C = 2/n sum (x_full - x) x^T; alpha of that step is
taken before the first column, in closed form.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lowbit.algorithms.replay import replayed
from lowbit.algorithms.statistics import Statistics
from lowbit.algorithms.table import Rounded
from lowbit.bits import pack_codes
from lowbit.errors import RecipeError
from lowbit.formats import Format
from lowbit.grid import effective_scales, effective_zeros, fit, quantize
from lowbit.grid_points import code_values, nearest_codes
from lowbit.options import GptqOptions
from lowbit.packing import PackedTensor, empty_buffers
from lowbit.search import Search, weighed

# Damping rises by this factor until there is a Cholesky factor, and no further than the mean diagonal itself.
_RISE = 4.0
_MOST_DAMPING = 1.0
# Triangular matrices up to this size are inverted at once.
_SMALL = 256


@dataclass(frozen=True)
class Columns:
    """The order in which columns are rounded, cut into segments of one group each: (first position, end, group)."""

    order: torch.Tensor
    segments: list[tuple[int, int, int]]


def round_gptq(weight: torch.Tensor, format: Format, statistics: Statistics | None, options: GptqOptions) -> Rounded:
    """Pack a weight [out, in] for the inputs that statistics describe."""
    assert statistics is not None, "gptq rounds by statistics"
    if format.kind == "kquant":
        raise RecipeError(
            f"gptq chooses codes under scales that it can read, and {format} hides its own in blocks: "
            "take an int format with the same bits, or the rounder rtn"
        )
    static = _needs_static(format) or options.static_groups
    columns = order_columns(statistics.diagonal, format, options.order, static)
    factor, damping = invert_factor(statistics.products, options.damping, columns.order)
    note = f"damping raised to {damping:g}" if damping > options.damping else ""
    target = weight.detach().float()
    if options.correction and statistics.differences is not None:
        target = target + options.correction * _correct(target, statistics.differences, factor, columns.order)
    grid = quantize(target, format, _search_of(format), _importance(statistics.diagonal)) if static else None
    rounding = _Rounding(target, format, columns, factor, grid)
    del (
        target,
        factor,
    )  # each as large as anything here: the factor of the widest linear is not held while codes are packed
    rounding.round_(options.block_columns)
    return Rounded(rounding.packed(), note)


def invert_factor(
    hessian: torch.Tensor, damping: float, order: torch.Tensor | None = None
) -> tuple[torch.Tensor, float]:
    """U, upper triangular with U^T U = (H + damping)^-1, and the damping that it took; columns may come in another order.

    Beside H and the result there is room for one more matrix of their size.
    """
    columns = torch.arange(len(hessian), device=hessian.device) if order is None else order
    backward = columns.flip(0)
    mean = hessian.diagonal().mean()
    unit = torch.where(mean > 0, mean, torch.ones_like(mean))
    while True:
        lower = hessian[backward[:, None], backward]
        lower.diagonal().add_(unit * damping)
        lower, failed = torch.linalg.cholesky_ex(lower)
        if not bool(failed) and bool(torch.isfinite(lower.sum())):
            invert_lower_(lower)
            if bool(torch.isfinite(lower.sum())):
                turn_(lower)
                return lower, damping
        if damping >= _MOST_DAMPING:
            raise RecipeError(
                "the Hessian has no Cholesky factor at any damping: its inputs hold NaN or infinite values"
            )
        damping = min(damping * _RISE, _MOST_DAMPING)


def turn_(matrix: torch.Tensor) -> None:
    """A square matrix with its rows and its columns in the opposite order, in its place."""
    count = len(matrix)
    for start in range(0, (count + 1) // 2, _SMALL):
        end = min(start + _SMALL, (count + 1) // 2)
        upper, below = matrix[start:end], matrix[count - end : count - start]
        kept = upper.flip(0, 1)
        upper.copy_(below.flip(0, 1))
        below.copy_(kept)


def invert_lower_(lower: torch.Tensor) -> None:
    """A lower triangular matrix becomes its inverse, by halves:  [A 0; B C]^-1 = [A^-1 0; -C^-1 B A^-1 C^-1]."""
    count = len(lower)
    if count <= _SMALL:
        lower.copy_(torch.linalg.solve_triangular(lower, torch.eye(count, device=lower.device), upper=False))
        return
    half = count // 2
    first, second = lower[:half, :half], lower[half:, half:]
    invert_lower_(first)
    invert_lower_(second)
    lower[half:, :half] = -(second @ (lower[half:, :half] @ first))


def order_columns(diagonal: torch.Tensor, format: Format, order: str, static: bool) -> Columns:
    """Which column is rounded when. Where scales are fixed beforehand the order may mix groups."""
    count = len(diagonal)
    size = format.group_size if format.group_size > 0 else count
    starts = range(0, count, size)
    if order == "activation" and static:
        mixed = torch.argsort(diagonal, descending=True, stable=True)
        return Columns(mixed, [(i, i + 1, int(c) // size) for i, c in enumerate(mixed.tolist())])
    groups = [(diagonal[start : start + size], start) for start in starts]
    inside = [torch.argsort(values, descending=True, stable=True) + start for values, start in groups]
    visited = list(range(len(groups)))
    if order == "none":
        inside = [torch.arange(start, start + len(values), device=diagonal.device) for values, start in groups]
    else:
        largest = torch.stack([values.amax() for values, _ in groups])
        visited = torch.argsort(largest, descending=True, stable=True).tolist()
    segments, position = [], 0
    for group in visited:
        segments.append((position, position + len(inside[group]), group))
        position += len(inside[group])
    return Columns(torch.cat([inside[group] for group in visited]), segments)


def _needs_static(format: Format) -> bool:
    """Whether the scale of one group depends on those of others."""
    return bool(format.scale_block) or format.has_global_scale or format.group_size == 0


def _search_of(format: Format) -> Search:
    """How widely scales are searched: as rtn does where it knows an importance."""
    return weighed(Search(), format.bits, format.symmetric) if format.kind == "int" else Search()


def _importance(values: torch.Tensor) -> torch.Tensor:
    """An importance without zeros: a group of inputs that were never seen is searched like any other."""
    return values.clamp_min(values.mean() * 1e-4 + 1e-20)


def _correct(
    weight: torch.Tensor, differences: torch.Tensor, factor: torch.Tensor, order: torch.Tensor
) -> torch.Tensor:
    """W C H^-1, where H^-1 = U^T U has its columns in an order of its own."""
    moved = (weight @ differences)[:, order] @ factor.t() @ factor
    corrected = torch.empty_like(moved)
    corrected[:, order] = moved
    return corrected


def round_columns(
    work: torch.Tensor, factor: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, format: Format
) -> tuple[torch.Tensor, torch.Tensor]:
    """The codes of some columns [n, out], which become what was rounded, and e of each; scale and zero are [1 or n, out]."""
    codes, errors = torch.empty_like(work, dtype=torch.uint8), torch.empty_like(work)
    last = len(scale) - 1
    for i in range(len(work)):
        column, step, origin = work[i], scale[min(i, last)], None if zero is None else zero[min(i, last)]
        chosen = nearest_codes(column, step, origin, format)
        codes[i] = chosen
        torch.div(column - step * code_values(chosen, origin, format), factor[i, i], out=errors[i])
        work[i + 1 :].addr_(factor[i, i + 1 :], errors[i], alpha=-1)
    return codes, errors


class _Rounding:
    """The weight while it is being rounded, as [in, out] in the order of rounding: a column is a row in memory."""

    def __init__(
        self, weight: torch.Tensor, format: Format, columns: Columns, factor: torch.Tensor, grid: PackedTensor | None
    ) -> None:
        self.shape, self.format, self.columns, self.factor = tuple(weight.shape), format, columns, factor
        self.work = weight.t()[columns.order].contiguous()
        self.codes = torch.empty(self.work.shape, dtype=torch.uint8, device=weight.device)
        self.grid = grid
        # Laid out as the weight is stored: [out, G].
        self.buffers = grid.tensors() if grid else empty_buffers(format, self.shape, torch)
        self.buffers = {name: tensor.to(weight.device) for name, tensor in self.buffers.items() if name != "codes"}
        self.scales = effective_scales(grid) if grid else None
        self.zeros = effective_zeros(grid) if grid else None

    def round_(self, most: int) -> None:
        """Round the columns, at most so many at a time, and pass on what they lost to those behind them."""
        for start, stop, groups in self._stretches(most):
            scale, zero = self._grid_of(groups, start, stop)
            for first in range(start, stop, most):
                end = min(first + most, stop)
                part = slice(first - start, end - start) if len(groups) > 1 else slice(None)
                codes, errors = replayed(
                    round_columns,
                    self.work[first:end],
                    self.factor[first:end, first:end],
                    scale[part],
                    None if zero is None else zero[part],
                    fixed=self.format,
                )
                self.codes[first:end] = codes
                self.work[end:].addmm_(self.factor[first:end, end:].t(), errors, alpha=-1)

    def _stretches(self, most: int) -> list[tuple[int, int, list[int]]]:
        """First and end of what is rounded under a grid that is known when its first column is reached, and the groups of it:
        one, or where grids are fixed those of as many columns as are rounded at a time."""
        segments = self.columns.segments
        if self.scales is None:
            return [(start, stop, [group]) for start, stop, group in segments]
        groups = [group for start, stop, group in segments for _ in range(start, stop)]
        return [(i, min(i + most, len(groups)), groups[i : i + most]) for i in range(0, len(groups), most)]

    def _grid_of(self, groups: list[int], start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Scales and zero points of some columns, [1 or columns, out]: as they were fixed, or fitted to the columns as they are."""
        if self.scales is not None:
            columns = groups if self.scales.shape[-1] > 1 else [0] * len(groups)
            scales, zeros = (
                None if part is None else part.expand(self.shape[0], -1)[:, columns].t().contiguous()
                for part in (self.scales, self.zeros)
            )
            assert scales is not None
            return scales, zeros
        cost = self.factor.diagonal()[start:stop].square().reciprocal()
        fitted = fit(self.work[start:stop].t().contiguous(), self.format, _search_of(self.format), _importance(cost))
        for name, stored in fitted.stored.items():
            self.buffers[name][:, groups[0]] = stored[:, 0]
        return fitted.scales.t().contiguous(), None if fitted.zeros is None else fitted.zeros.t().contiguous()

    def packed(self) -> PackedTensor:
        """The weight in its stored form, columns back where they were; the rounding ends here."""
        del self.factor, self.work
        codes = torch.empty_like(self.codes)
        codes[self.columns.order] = self.codes
        stored = pack_codes(codes.t().contiguous(), self.format.bits)
        return PackedTensor(self.format, self.shape, stored, **self.buffers)
