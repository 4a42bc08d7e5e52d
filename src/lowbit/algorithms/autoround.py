"""AutoRound: which way each weight is rounded, and how far each group reaches, tuned on the output of a whole block.

    q  = clamp(round(w / s + v) + z)          v [out, in] in [-1/2, 1/2], 0 at first: a vote for the other neighbour
    s  = s0 f                                 symmetric: a factor f for each group, 1 at first
    s  = (f1 high - f0 low) / (2^b - 1)       asymmetric: one factor for each end of the group
    loss = mean |block(x; w^) - target|^2     over a mini-batch of rows of the calibration text

v and f descend by the sign of their gradient, p -= rate sign(dloss/dp), the rounding itself passed straight through.
The rate falls linearly to nothing. From 1 / iterations the way adds up to 1/2, from one neighbour to the other and no
further; where a whole block has 4 bits it starts at twice that, so that a vote can be taken back: KL of the reference
model at int4_g64 0.112 instead of 0.129. At 3 and 2 bits, where ranges move far, the same costs up to 5%, and where 4
bits stand beside more, 8% (docs/notes/calibration.md).
Kept are the parameters with the least loss met. A mini-batch is judged by its loss relative to that of the same rows
at the start: some rows are harder than others, and by plain losses the kept parameters would be those that met the
easiest rows. At the end they are measured on all rows, beside the last ones, which no lucky mini-batch chose, and the
start: the block is never left worse than round-to-nearest leaves it.

The start is the grid of `rtn`, weighed by the importance of the inputs where that is given. At 2 and 3 bits the
thousandth part of a mini-batch with the largest errors is left out of the loss (SignRoundV2, arXiv 2512.04746): at that
width a few outputs are lost anyway, and would have all gradients to themselves.

Rows are run together where they get the same beside the hidden state and a trial shows that the block keeps rows apart;
else every call stays whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from lowbit.algorithms.rtn import floored, round_to_nearest
from lowbit.algorithms.statistics import Statistics
from lowbit.algorithms.table import BlockWork, Rounded, Tell, unheard
from lowbit.bits import pack_codes
from lowbit.errors import RecipeError
from lowbit.formats import Format
from lowbit.grid import fit_grid, group_weight, scale_rounder, store_grid
from lowbit.grid_points import round_zeros
from lowbit.models.capture import Call, watch_calls
from lowbit.models.walk import Target, stored_order
from lowbit.options import AUTOROUND_RECIPES, AutoRoundOptions, RtnOptions
from lowbit.packing import PackedTensor
from lowbit.search import Search

_FEW_BITS, _USUAL_BITS = 3, 4
_FACTOR_RANGE = (0.0, 2.0)


_DEFAULTS = AUTOROUND_RECIPES["default"]
_REST = "rounded to nearest: autoround tunes the linears of a block that become integers"


def tune_block(
    block: nn.Module,
    linears: Mapping[str, Format],
    calls: Sequence[Call],
    targets: Sequence[torch.Tensor],
    options: AutoRoundOptions = _DEFAULTS,
    importance: Mapping[str, torch.Tensor] | None = None,
    tell: Tell = unheard,
) -> dict[str, PackedTensor]:
    """Pack linears of a block, named by their paths in it, so that it gives the targets when it is called like that.

    `importance` [in] of a linear is the mean of its squared inputs. The block itself is left as it is.
    """
    if not linears or not calls or len(calls) != len(targets):
        raise RecipeError("autoround needs linears to tune, and calls of the block with a target for each")
    tuned = {path: _Tuned(block, path, format, (importance or {}).get(path)) for path, format in linears.items()}
    text = _Rows(block, calls, targets)
    start = text.losses(tuned)
    kept, least = _copy(tuned), float(start.sum())
    with torch.enable_grad():
        best = _descend(text, tuned, start, options, tell)
    # Not a single mini-batch but all rows decide which parameters are kept, and whether the tuning was worth it.
    for parameters in (_copy(tuned), best):
        _restore(tuned, parameters)
        loss = float(text.losses(tuned).sum())
        if loss <= least:
            kept, least = parameters, loss
    _restore(tuned, kept)
    return {path: weight.pack() for path, weight in tuned.items()}


def round_in_block(work: BlockWork, options: AutoRoundOptions) -> dict[str, Rounded]:
    """The row `autoround`: the linears of a block that become integers."""
    linears = {path: format for path, format in work.formats.items() if format.kind == "int"}
    if not linears:
        return {}
    calls = work.calls if options.enable_quanted_input else work.full_calls
    importance = mean_squares(work.block, calls, linears)
    seen = {path: format for path, format in linears.items() if path in importance}
    tuned = tune_block(work.block, seen, calls, work.targets, options, importance, work.tell) if seen else {}
    return {path: Rounded(packed) for path, packed in tuned.items()}


def round_rest(
    weight: torch.Tensor, format: Format, statistics: Statistics | None, options: AutoRoundOptions
) -> Rounded:
    """The row `autoround`: what is not tuned."""
    return Rounded(round_to_nearest(weight, format, statistics, RtnOptions()).packed, _REST)


def mean_squares(block: nn.Module, calls: Sequence[Call], paths: Iterable[str]) -> dict[str, torch.Tensor]:
    """The mean square of each input [in] of linears of a block; of those that ran, and on more than nothing."""
    sums: dict[str, torch.Tensor] = {}
    counts: dict[str, int] = {}
    modules = {path: block.get_submodule(path) for path in paths}
    for seen in watch_calls(block, calls, modules.values()):
        for path, module in modules.items():
            for args, _ in seen.given.get(module, ()):
                tokens = args[0].detach().float().flatten(0, -2)
                sums[path] = sums.get(path, 0.0) + tokens.square().sum(0)
                counts[path] = counts.get(path, 0) + len(tokens)
    found = {path: total / max(counts[path], 1) for path, total in sums.items()}
    return {path: floored(square) for path, square in found.items() if bool(square.any())}


class _Tuned:
    """One weight while it is tuned, in groups [groups, size]."""

    def __init__(self, block: nn.Module, path: str, format: Format, importance: torch.Tensor | None) -> None:
        if format.kind != "int":
            raise RecipeError(f"autoround tunes integers, and {path} is to be {format}: take rtn, or an int format")
        self.path, self.format = path, format
        self.target = Target(path, "linear", block.get_submodule(path))
        original: Any = self.target.module.weight
        self.dtype = original.dtype
        weight = stored_order(self.target, original.detach())
        self.shape = tuple(weight.shape)
        self.groups, _ = group_weight(weight, format)
        self.rounder = scale_rounder(weight, format)
        grid = fit_grid(weight, format, Search(), importance)
        self.scales = grid.scales.reshape(-1, 1)
        self.zeros = None if grid.zeros is None else grid.zeros.reshape(-1, 1)
        self.votes = torch.zeros_like(self.groups).requires_grad_(True)
        ends = 1 if format.symmetric else 2
        self.factors = torch.ones(len(self.groups), ends, device=self.groups.device).requires_grad_(True)

    @property
    def parameters(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.votes, self.factors

    def step_(self, rate: float, range_rate: float) -> None:
        """One step against the signs of the gradients, and back into the limits."""
        with torch.no_grad():
            for parameter, by, (low, high) in (
                (self.votes, rate, (-0.5, 0.5)),
                (self.factors, range_rate, _FACTOR_RANGE),
            ):
                if parameter.grad is not None:
                    parameter.sub_(by * parameter.grad.sign()).clamp_(low, high)
                    parameter.grad = None

    def rounded(self) -> torch.Tensor:
        """The weight as it would be read back, in the order and type of the module, with gradients."""
        scales, zeros = self._grid()
        values = scales * (self._codes(scales, zeros) - zeros)
        return stored_order(self.target, self._shaped(values)).to(self.dtype)

    def pack(self) -> PackedTensor:
        with torch.no_grad():
            scales, zeros = self._grid()
            codes = self._codes(scales, zeros).to(torch.uint8)
            grid = store_grid(self.shape, self.groups, scales, None if self.format.symmetric else zeros, self.rounder)
            return PackedTensor(
                self.format, self.shape, pack_codes(self._shaped(codes), self.format.bits), **grid.stored
            )

    def _grid(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Scales and zero points [groups, 1] as they will be stored."""
        format = self.format
        if format.scale_block:  # the second level is fitted to the scales of the start, which stay
            zeros = torch.full_like(self.scales, format.midpoint) if self.zeros is None else self.zeros
            return self.scales, zeros
        if self.zeros is None:
            scales = _straight(self.scales * self.factors, self.rounder)
            return scales, torch.full_like(scales, format.midpoint)
        low = self.scales * self.zeros * self.factors[:, :1]
        high = self.scales * (format.max_code - self.zeros) * self.factors[:, 1:]
        scales = _straight((low + high) / format.max_code, self.rounder)
        return scales, _straight(low / scales, partial(round_zeros, format=format))

    def _codes(self, scales: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
        whole = zeros.floor()
        nearest = _straight(self.groups / scales + self.votes + (zeros - whole), torch.round)
        return (nearest + whole).clamp(0, self.format.max_code)

    def _shaped(self, groups: torch.Tensor) -> torch.Tensor:
        """Groups as the weight [out, in], without the padding."""
        if self.format.group_size == 0:
            return groups.reshape(self.shape)
        return groups.reshape(*self.shape[:-1], -1)[..., : self.shape[-1]]


def _straight(x: torch.Tensor, function: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """A rounding whose gradient is passed on as it is."""
    return x + (function(x) - x).detach()


@dataclass(frozen=True)
class _Unit:
    """Rows that stay together: one row, or a whole call."""

    hidden: torch.Tensor
    target: torch.Tensor
    frame: int


class _Rows:
    """The calibration text at one block: rows of the hidden state, what the block gets beside them, and the targets."""

    def __init__(self, block: nn.Module, calls: Sequence[Call], targets: Sequence[torch.Tensor]) -> None:
        self.block, self.pattern = block, calls[0]
        # Everything that is not tuned stands still, and gathers no gradients.
        self.constants = {name: value.detach() for name, value in block.named_parameters()}
        self.device = next((p.device for p in block.parameters()), targets[0].device)
        self.frames: list[dict[int | str, Any]] = []
        self.units: list[_Unit] = []
        apart = _keeps_rows_apart(block, calls[0])
        for call, target in zip(calls, targets, strict=True):
            hidden = call.hidden
            if not apart:
                self.frames.append(call.beside())
                self.units.append(_Unit(hidden, target, len(self.frames) - 1))
                continue
            for row in range(len(hidden)):
                frame = self._frame(_row_of(call.beside(), row, len(hidden)))
                self.units.append(_Unit(hidden[row : row + 1], target[row : row + 1], frame))

    def losses(self, tuned: Mapping[str, _Tuned]) -> torch.Tensor:
        """The mean squared error of each unit."""
        found = torch.zeros(len(self.units))
        with torch.no_grad():
            weights = _rounded_weights(tuned)
            for places in _bunches(len(self.units), 8):
                for some, error in self.errors(weights, places):
                    found[some] = torch.stack([part.square().mean() for part in error]).cpu()
        return found

    def errors(self, weights: dict[str, torch.Tensor], places: list[int]) -> Iterator[tuple[list[int], torch.Tensor]]:
        """What the block gives less what it should, for units that are run together."""
        frames: dict[int, list[int]] = {}
        for place in places:
            frames.setdefault(self.units[place].frame, []).append(place)
        for frame, some in frames.items():
            hidden = torch.cat([self.units[i].hidden for i in some]).to(self.device)
            target = torch.cat([self.units[i].target for i in some]).to(self.device)
            call = self.pattern.with_beside(self.frames[frame]).with_hidden(hidden)
            error = (_run(self.block, self.constants | weights, call) - target).float()
            yield some, error if len(some) == len(error) else error[None]

    def _frame(self, beside: dict[int | str, Any]) -> int:
        """The number of a frame, the same for equal ones."""
        for number in range(len(self.frames) - 1, -1, -1):
            if _equal(self.frames[number], beside):
                return number
        self.frames.append(beside)
        return len(self.frames) - 1


def _descend(
    text: _Rows, tuned: Mapping[str, _Tuned], start: torch.Tensor, options: AutoRoundOptions, tell: Tell
) -> list[torch.Tensor]:
    """Tune in place; the copy of the parameters with the least relative loss that was met."""
    bits = min(weight.format.bits for weight in tuned.values())
    outliers = options.outliers if bits <= _FEW_BITS else 0.0
    rate = first_rate(options, {weight.format.bits for weight in tuned.values()})
    # At 8 bits a factor that moves by 1/200 moves the outermost weights across more than half a step at once.
    range_rate = rate / 2 ** max(bits - _USUAL_BITS, 0) if not options.range_rate else options.range_rate
    best, least = _copy(tuned), 1.0
    for iteration, places in enumerate(_mini_batches(text, options)):
        loss = _backward(text, tuned, places, outliers) / max(float(start[places].sum()), 1e-30)
        if loss < least:
            best, least = _copy(tuned), loss
        left = 1 - iteration / options.iterations
        for weight in tuned.values():
            weight.step_(rate * left, range_rate * left)
        tell(f"autoround {iteration + 1} of {options.iterations}", (iteration + 1) / options.iterations)
    return best


def first_rate(options: AutoRoundOptions, bits: set[int]) -> float:
    """The rate at the start: 2 / iterations where all of a block has 4 bits, else half of it."""
    return options.rate or (2 if bits == {_USUAL_BITS} else 1) / options.iterations


def _backward(text: _Rows, tuned: Mapping[str, _Tuned], places: list[int], outliers: float) -> float:
    """Gradients of the loss of a mini-batch; returns the sum of the mean squared errors of its units."""
    rounded = _rounded_weights(tuned)
    # Units that cannot be run together meet in the gradients of the weights, which then go on to the parameters once.
    leaves = {name: weight.detach().requires_grad_(True) for name, weight in rounded.items()}
    total = 0.0
    for _, error in text.errors(leaves, places):
        squares = error.square()
        total += float(squares.detach().flatten(1).mean(1).sum())
        (_trimmed(squares, outliers) / len(places)).backward()  # type: ignore[no-untyped-call]
    reached = [name for name, leaf in leaves.items() if leaf.grad is not None]
    torch.autograd.backward([rounded[name] for name in reached], [leaves[name].grad for name in reached])
    return total


def _trimmed(squares: torch.Tensor, outliers: float) -> torch.Tensor:
    """The mean over units, summed, without the share of the largest."""
    each = squares[0].numel()
    count = int(outliers * squares.numel())
    if not count:
        return squares.sum() / each
    bound = squares.detach().flatten().topk(count).values[-1]
    return torch.where(squares < bound, squares, torch.zeros_like(squares)).sum() / each


def _mini_batches(text: _Rows, options: AutoRoundOptions) -> Iterator[list[int]]:
    """Units for each iteration: every one is seen once before any is seen again."""
    generator = torch.Generator().manual_seed(options.seed)
    rows = len(text.units[0].hidden)
    wanted = min(max(options.batch_rows // rows, 1), len(text.units))
    order: list[int] = []
    for _ in range(options.iterations):
        if len(order) < wanted:
            order = torch.randperm(len(text.units), generator=generator).tolist()
        yield [order.pop() for _ in range(wanted)]


def _bunches(count: int, size: int) -> Iterator[list[int]]:
    for first in range(0, count, size):
        yield list(range(first, min(first + size, count)))


def _rounded_weights(tuned: Mapping[str, _Tuned]) -> dict[str, torch.Tensor]:
    return {f"{path}.weight": weight.rounded() for path, weight in tuned.items()}


def _copy(tuned: Mapping[str, _Tuned]) -> list[torch.Tensor]:
    return [p.detach().clone() for weight in tuned.values() for p in weight.parameters]


def _restore(tuned: Mapping[str, _Tuned], copies: list[torch.Tensor]) -> None:
    parameters = [p for weight in tuned.values() for p in weight.parameters]
    with torch.no_grad():
        for parameter, copy in zip(parameters, copies, strict=True):
            parameter.copy_(copy)


def _run(block: nn.Module, weights: dict[str, torch.Tensor], call: Call) -> torch.Tensor:
    """The hidden state that a block gives with other weights."""
    output = torch.func.functional_call(block, weights, call.args, call.kwargs)
    hidden: torch.Tensor = output[0] if isinstance(output, tuple | list) else output
    return hidden


def _keeps_rows_apart(block: nn.Module, call: Call) -> bool:
    """Whether the last row of a call, run twice in one batch, gives both times what it gives among its own."""
    hidden = call.hidden
    row = call.with_beside(_row_of(call.beside(), len(hidden) - 1, len(hidden)))
    with torch.no_grad():
        whole = _run(block, {}, call.with_hidden(hidden))[-1:]
        try:
            twice = _run(block, {}, row.with_hidden(torch.cat([hidden[-1:]] * 2)))
        except (RuntimeError, IndexError, ValueError):  # shapes that do not go together
            return False
    return twice.shape[1:] == whole.shape[1:] and torch.allclose(
        twice.float(), whole.float().expand_as(twice), rtol=1e-2, atol=1e-2 * float(whole.float().std())
    )


def _row_of(value: Any, row: int, rows: int) -> Any:
    """What belongs to one of several rows."""
    if isinstance(value, torch.Tensor):
        return value[row : row + 1] if rows > 1 and value.dim() > 1 and len(value) == rows else value
    if isinstance(value, dict):
        return {key: _row_of(item, row, rows) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_row_of(item, row, rows) for item in value)
    return value


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one is other or (one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    if isinstance(one, tuple | list) and isinstance(other, tuple | list):
        return len(one) == len(other) and all(_equal(a, b) for a, b in zip(one, other, strict=True))
    return one is other or (type(one) is type(other) and isinstance(one, str | int | float) and one == other)
