"""Weights as places in a short table of numbers: w = scale * levels[index], a scale for each group.

    cb4                 16 numbers of 8-bit floats, denser around zero and reaching further up on neither side
    codebook            whatever numbers the caller names, 2 to 256 of them
    adaptive_codebook   16 for each weight, placed where its numbers are: the means of what is rounded to each (Lloyd)

A scale may be negative, so that a table which is not even fits a group either way round. Scales are searched like those of every
format: the plain one and some below it, each refitted by least squares to the places that it gives, and the one with the least
sum m (s l - w)^2 stays, m being the importance of the input, or sqrt|w| without data.

In a graph: Constant u4 [.., out, groups, group] -> Convert -> Gather(levels) -> Multiply(scales) -> Reshape. Plugins know no
product of such a weight: the CPU's makes the plain one of it when it compiles. It saves room in the file, and none in memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lowbit.errors import RecipeError
from lowbit.formats import LEVELS, PER_CHANNEL
from lowbit.openvino.constants import Numbers, pack_numbers
from lowbit.openvino.library import ops
from lowbit.openvino.modes import AdvancedCompressionParameters, CompressWeightsMode
from lowbit.openvino.weights import Copies
from lowbit.search import SEARCHES

CB4 = (
    -3.5, -2.5, -1.875, -1.375, -1.0, -0.625, -0.3125, 0.0, 0.28125, 0.5625, 0.875, 1.125, 1.5, 2.0, 2.5, 3.5,
)  # fmt: skip
_MOST = 256
# The types of a table's numbers, by the names of two libraries.
_KINDS = {"f8e4m3": "f8e4m3", "float16": "f16", "float32": "f32"}
_NIBBLE = 16  # places that four bits can say
_AT_ONCE = 1 << 22
_SAMPLE = 1 << 20  # numbers of a weight that its own table is fitted to
_ROUNDS = 25
_TINY = 6e-8  # no scale in f16 is smaller
_E4M3 = np.array([value if math.isfinite(value) else np.inf for value in LEVELS["e4m3"]], np.float32)


@dataclass(frozen=True)
class Codebook:
    """What a weight is rounded to; without `levels` each weight has a table of its own, of `count` numbers of type `kind`."""

    label: str
    group_size: int
    levels: tuple[float, ...] = ()
    count: int = _NIBBLE
    kind: str = "f8e4m3"

    @property
    def name(self) -> str:
        return f"{self.label}_g{self.group_size}" if self.group_size > 0 else f"{self.label}_channel"

    @property
    def bits(self) -> int:
        return 4 if (len(self.levels) or self.count) <= _NIBBLE else 8

    def with_group(self, size: int) -> Codebook:
        return Codebook(self.label, size, self.levels, self.count, self.kind)


@dataclass(frozen=True)
class Placed:
    """A weight [.., out, in] as places in a table: index uint8 [.., out, groups, group], scales f16 [.., out, groups, 1]."""

    book: Codebook
    levels: torch.Tensor
    index: torch.Tensor
    scales: torch.Tensor

    note = "plugins make plain numbers of it: nf4 stays packed"

    @property
    def nbytes(self) -> int:
        return self.index.numel() * self.book.bits // 8 + 2 * self.scales.numel() + self._table().array.nbytes

    def restored(self) -> torch.Tensor:
        """The numbers that it stands for."""
        return (self.levels[self.index.long()] * self.scales.float()).flatten(-2)

    def output(self, name: str) -> Any:
        """The output [.., out, in] in f32 of its nodes."""
        copies, shape = Copies(), tuple(self.index.shape)
        table = self._table()
        through = "f32" if table.type == "f32" else "f16"
        levels = copies.constant(table, f"{name}.levels")
        levels = levels if table.type == through else ops.convert(levels, through)
        codes = pack_numbers(self.index.numpy().reshape(1, -1), self.book.bits)
        places = copies.constant(Numbers(codes, shape, f"u{self.book.bits}"), f"{name}.weight")
        value = ops.gather(levels, ops.convert(places, "i32"), ops.constant(np.array(0, np.int64)))
        scales = copies.constant(Numbers(self.scales.numpy(), tuple(self.scales.shape), "f16"), f"{name}.scales")
        value = ops.multiply(value, scales if through == "f16" else ops.convert(scales, through))
        value = ops.reshape(value, np.array((*shape[:-2], shape[-2] * shape[-1]), np.int64), False)
        return (value if through == "f32" else ops.convert(value, "f32")).output(0)

    def _table(self) -> Numbers:
        values = self.levels.numpy()
        kind = type_of(values)
        if kind == "f8e4m3":
            codes = np.abs(_E4M3[None] - values[:, None]).argmin(1).astype(np.uint8)
            return Numbers(codes, codes.shape, kind)
        return Numbers(values.astype(np.float16 if kind == "f16" else np.float32), values.shape, kind)


def type_of(values: np.ndarray) -> str:
    """The narrowest of OpenVINO's types that holds some numbers exactly."""
    if np.isin(values, _E4M3).all():
        return "f8e4m3"
    with np.errstate(over="ignore"):
        return "f16" if np.array_equal(values.astype(np.float16).astype(np.float32), values) else "f32"


def read_levels(given: Any) -> tuple[float, ...]:
    """A caller's table: a sequence, an array, or an openvino.Tensor; sorted, each number once."""
    if given is None:
        raise RecipeError(
            "CODEBOOK rounds to a table of your own: AdvancedCompressionParameters(codebook=[-1.0, ..., 1.0]) names it; "
            "ADAPTIVE_CODEBOOK makes one for each weight"
        )
    values = np.unique(np.asarray(getattr(given, "data", given), np.float32).ravel())
    if not 2 <= values.size <= _MOST or not np.isfinite(values).all() or not values.any():
        raise RecipeError(f"a codebook has 2 to {_MOST} different finite numbers, and this one {values.size}")
    return tuple(float(value) for value in values)


def codebook_of(mode: CompressWeightsMode, advanced: AdvancedCompressionParameters) -> Codebook:
    """What a mode with a table rounds to; its groups are given later."""
    if mode is CompressWeightsMode.CODEBOOK:
        levels = read_levels(advanced.codebook)
        return Codebook(f"codebook{len(levels)}", PER_CHANNEL, levels, kind=type_of(np.array(levels, np.float32)))
    if mode is not CompressWeightsMode.ADAPTIVE_CODEBOOK:
        return Codebook("cb4", PER_CHANNEL, CB4)
    params = advanced.adaptive_codebook_params
    kind = str(getattr(params.value_type, "value", params.value_type))
    kind = _KINDS.get(kind, kind)
    if params.across_blocks:
        raise RecipeError(
            "across_blocks shares a table among layers: each weight has one of its own here, which fits better"
        )
    if kind not in _KINDS.values() or not 2 <= params.num_elements <= _MOST:
        raise RecipeError(
            f"tables of {params.num_elements} numbers in {kind}: there are 2 to {_MOST}, in {', '.join(_KINDS.values())}"
        )
    return Codebook(f"adaptive{params.num_elements}", PER_CHANNEL, count=params.num_elements, kind=kind)


def place(weight: torch.Tensor, book: Codebook, importance: torch.Tensor | None = None) -> Placed:
    """Round a weight [.., out, in]; `importance` [in] weighs the squared error of each input."""
    inputs = weight.shape[-1]
    size = inputs if book.group_size <= 0 else book.group_size
    groups = weight.float().reshape(-1, size)
    own = None if importance is None else importance.float().reshape(-1, size)
    levels = torch.tensor(book.levels) if book.levels else _own_levels(groups, own, book)
    index, scales = torch.empty(groups.shape, dtype=torch.uint8), torch.empty(len(groups), 1, dtype=torch.float16)
    for rows, part, m in _parts(groups, own):
        scales[rows], index[rows] = _fit(part, m, levels)
    shape = (*weight.shape[:-1], inputs // size)
    return Placed(book, levels, index.view(*shape, size), scales.view(*shape, 1))


def _parts(groups: torch.Tensor, importance: torch.Tensor | None) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """Some groups at a time with how much each number matters; `importance` [groups of a row, group] repeats with every row."""
    repeat = 1 if importance is None else len(importance)
    step = max(_AT_ONCE // groups.shape[-1] // repeat, 1) * repeat
    for start in range(0, len(groups), step):
        part = groups[start : start + step]
        m = part.abs().sqrt() if importance is None else importance.repeat(len(part) // repeat, 1)
        yield slice(start, start + step), part, m


def _fit(groups: torch.Tensor, m: torch.Tensor, levels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales [groups, 1] in f16 and places [groups, group] with the least weighted squared error."""
    between = (levels[1:] + levels[:-1]) / 2
    largest = groups.abs().amax(1, keepdim=True) / (float(levels.abs().max()) or 1.0)
    best = torch.full_like(largest, torch.inf)
    scales, index = largest.half(), torch.zeros_like(groups, dtype=torch.uint8)
    even = torch.equal(levels, -levels.flip(0))
    for ratio in (1.0, *SEARCHES["rtn"].ratios()):
        for sign in (1.0,) if even else (1.0, -1.0):
            tried = largest * (sign * ratio)
            values = levels[_nearest(groups, tried, between)]
            square = (m * values.square()).sum(1, keepdim=True)
            fitted = torch.where(square > 0, (m * groups * values).sum(1, keepdim=True) / square, tried).half()
            places = _nearest(groups, fitted.float(), between)
            error = (m * (levels[places] * fitted.float() - groups).square()).sum(1, keepdim=True)
            better = error < best
            best, scales = torch.where(better, error, best), torch.where(better, fitted, scales)
            index = torch.where(better, places.to(torch.uint8), index)
    return scales, index


def _nearest(groups: torch.Tensor, scales: torch.Tensor, between: torch.Tensor) -> torch.Tensor:
    safe = torch.where(scales.abs() < _TINY, torch.ones_like(scales), scales)
    return torch.bucketize(groups / safe, between)


def _own_levels(groups: torch.Tensor, importance: torch.Tensor | None, book: Codebook) -> torch.Tensor:
    """The table of one weight: where the numbers of its groups lie, the largest of each group at 1."""
    # Drawn, because every n-th group would be the same columns of each row.
    chosen = torch.randperm(len(groups), generator=torch.Generator().manual_seed(0))
    chosen = chosen[: max(_SAMPLE // groups.shape[1], 1)]
    sample = groups[chosen]
    m = sample.abs().sqrt() if importance is None else importance[chosen % len(importance)]
    extreme = sample.gather(1, sample.abs().argmax(1, keepdim=True))
    safe = torch.where(extreme.abs() < _TINY, torch.ones_like(extreme), extreme)
    x, order = (sample / safe).double().ravel().sort()
    mass = (m * safe.square()).double().ravel()[order]
    weights, moments = (torch.cat([torch.zeros(1).double(), t.cumsum(0)]) for t in (mass, mass * x))
    levels = x[torch.linspace(0, len(x) - 1, book.count).long()]
    for _ in range(_ROUNDS):
        ends = torch.searchsorted(x, (levels[1:] + levels[:-1]) / 2)
        edges = torch.cat([torch.zeros(1, dtype=torch.long), ends, torch.tensor([len(x)])])
        total = weights[edges[1:]] - weights[edges[:-1]]
        moment = moments[edges[1:]] - moments[edges[:-1]]
        levels = torch.where(total > 0, moment / total, levels)
    return torch.from_numpy(_rounded(levels.float().numpy(), book.kind))


def _rounded(levels: np.ndarray, kind: str) -> np.ndarray:
    """The levels in their type, each once."""
    if kind == "f8e4m3":
        levels = _E4M3[np.abs(_E4M3[None] - levels[:, None]).argmin(1)]
    return np.unique(levels.astype(np.float16 if kind == "f16" else np.float32).astype(np.float32))
