"""Mixed precision: a format for every weight, so that the sum of errors is least and the sum of bytes is within a budget.

    minimise  sum_i error[i][f_i]   subject to   sum_i size[i][f_i] <= budget           one format f_i for each weight i

This is the multiple-choice knapsack. It is solved exactly: weight after weight, all partial choices are kept that no
other beats in both size and error, less those that cannot lead to a choice better than one already known. What such a
choice will cost at least is said by the price p of a byte at which the relaxed problem meets the budget:

    error so far + sum over the rest of min_f (error + p size) - p (budget - size so far)

That bound is within the error of a single weight of the truth, so a few thousand partial choices are alive at a time
where there are 6^210 in all. `stored_bytes` gives sizes; where errors come from is `sensitivity.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from lowbit.errors import RecipeError
from lowbit.formats import SCALE_BITS, Format
from lowbit.packing import code_shape, scale_shape

# What an allocation offers: the widths of the integers.
OFFERED_BITS = (2, 3, 4, 5, 6, 8)
_HALVINGS = 100
# Bounds are sums in doubles; what they cut off is worse by more than rounding.
_SLACK = 1e-9
Option = TypeVar("Option")
Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


@dataclass(frozen=True)
class _Row:
    """The options of one weight that another does not beat in both size and error, from small to large."""

    sizes: Integers
    errors: Floats
    places: Integers


def allocate(
    sizes: Mapping[str, Mapping[Option, int]], errors: Mapping[str, Mapping[Option, float]], budget: int
) -> dict[str, Option]:
    """The option of each weight with the least sum of errors, among the choices whose sizes sum to a budget at most."""
    rows = [_undominated(path, sizes[path], errors[path]) for path in sizes]
    smallest = sum(int(row.sizes[0]) for row in rows)
    if smallest > budget:
        raise RecipeError(
            f"a budget of {budget} is too small: the smallest formats that are offered need {smallest} together"
        )
    chosen = _search(rows, budget)
    return {path: list(sizes[path])[row.places[index]] for (path, row, index) in zip(sizes, rows, chosen, strict=True)}


def stored_bytes(format: Format, shape: tuple[int, ...]) -> int:
    """The bytes that a weight of a shape takes in a format."""
    codes = math.prod(code_shape(format, shape))
    if format.block is not None:
        return codes
    scales = math.prod(scale_shape(format, shape))
    width, second_level = SCALE_BITS[format.scale_dtype] // 8, 4 * format.has_global_scale
    if format.scale_block:
        width, second_level = 1, 4 * (-(-scales // format.scale_block) + 1)
    return 4 * codes + scales * (width + (not format.symmetric)) + second_level


def byte_budget(bits_per_weight: float, shapes: Sequence[tuple[int, ...]]) -> int:
    """How many bytes weights of these shapes may take at so many bits per weight, scales included."""
    return int(bits_per_weight * sum(math.prod(shape) for shape in shapes) / 8)


def _undominated(path: str, sizes: Mapping[Any, int], errors: Mapping[Any, float]) -> _Row:
    """What of a weight's options can be part of a best choice."""
    if not sizes or set(sizes) != set(errors):
        raise RecipeError(f"{path}: an allocation needs the size and the error of the same formats, at least of one")
    options = list(sizes)
    kept: list[int] = []
    for place in sorted(range(len(options)), key=lambda i: (sizes[options[i]], errors[options[i]])):
        if not math.isfinite(errors[options[place]]):
            raise RecipeError(f"{path}: its error at {options[place]} is not a finite number")
        if not kept or errors[options[place]] < errors[options[kept[-1]]]:
            kept.append(place)
    return _Row(
        np.array([sizes[options[i]] for i in kept], dtype=np.int64),
        np.array([errors[options[i]] for i in kept], dtype=np.float64),
        np.array(kept, dtype=np.int64),
    )


def _search(rows: list[_Row], budget: int) -> list[int]:
    """The index of the best option of each row."""
    price = _price(rows, budget)
    known = sum(float(row.errors[i]) for row, i in zip(rows, _greedy(rows, budget, price), strict=True))
    # What the rows from i on cost at least: in bytes, and in errors with bytes paid for.
    least_size = np.cumsum([0, *(int(row.sizes[0]) for row in reversed(rows))])[::-1]
    least_paid = np.cumsum([0.0, *(float((row.errors + price * row.sizes).min()) for row in reversed(rows))])[::-1]
    limit = known + _SLACK * (1 + abs(known))
    size, error = np.zeros(1, dtype=np.int64), np.zeros(1)
    steps: list[tuple[Integers, Integers]] = []
    for place, row in enumerate(rows, 1):
        sizes = (size[:, None] + row.sizes).ravel()
        errors = (error[:, None] + row.errors).ravel()
        bound = errors + least_paid[place] - price * (budget - sizes)
        alive = np.flatnonzero((sizes + least_size[place] <= budget) & (bound <= limit))
        alive = alive[np.lexsort((errors[alive], sizes[alive]))]
        lowest = np.minimum.accumulate(errors[alive])
        first = np.ones(len(alive), dtype=bool)
        first[1:] = errors[alive][1:] < lowest[:-1]
        alive = alive[first]
        steps.append((alive // len(row.sizes), alive % len(row.sizes)))
        size, error = sizes[alive], errors[alive]
    return _walk_back(steps, len(size) - 1)


def _walk_back(steps: list[tuple[Integers, Integers]], last: int) -> list[int]:
    """The options along the way to the last partial choice, which has the least error."""
    chosen: list[int] = []
    for parents, options in reversed(steps):
        chosen.append(int(options[last]))
        last = int(parents[last])
    return chosen[::-1]


def _price(rows: list[_Row], budget: int) -> float:
    """The price of a byte above which the choice that is best at that price meets the budget."""

    def size_at(price: float) -> int:
        return sum(int(row.sizes[np.argmin(row.errors + price * row.sizes)]) for row in rows)

    if size_at(0.0) <= budget:
        return 0.0
    low, high = 0.0, 1e-12
    while size_at(high) > budget:
        low, high = high, high * 16
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if size_at(middle) > budget else (low, middle)
    return high


def _greedy(rows: list[_Row], budget: int, price: float) -> list[int]:
    """A choice within the budget: the best at a price, and then what still fits, the most saved error per byte first."""
    chosen = [int(np.argmin(row.errors + price * row.sizes)) for row in rows]
    left = budget - sum(int(row.sizes[i]) for row, i in zip(rows, chosen, strict=True))
    while upgrades := [u for place, row in enumerate(rows) for u in _upgrades(row, chosen[place], place, left)]:
        _, more, place, option = max(upgrades)
        chosen[place], left = option, left - more
    return chosen


def _upgrades(row: _Row, now: int, place: int, left: int) -> Iterator[tuple[float, int, int, int]]:
    """Larger options of a row that fit: the error saved per byte, the bytes, and which option of which row."""
    for option in range(now + 1, len(row.sizes)):
        more = int(row.sizes[option] - row.sizes[now])
        if more <= left:
            yield float(row.errors[now] - row.errors[option]) / more, more, place, option
