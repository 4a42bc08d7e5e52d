"""Scaling groups: where a scale for each channel can be moved from one weight into the next, found by running the block.

Weights that receive the very same tensor belong together. What made that tensor (a norm), or a weight whose rows are
behind its channels (`sources.py`: values behind the output projection, up behind down), is `previous`. A group counts
only if folding a scale into the whole block leaves its output as it was: no list of class names says so. The scales of
that trial are powers of two, which are exact in every type, so that a fold is right to the bit or wrong. What does not
fold is a `Refusal` with its reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from lowbit.errors import WeightError
from lowbit.models.capture import Call, run_block
from lowbit.models.folding import Holder, ScalingGroup, find_holder, folded, multiplied
from lowbit.models.sources import find_sources
from lowbit.models.walk import find_targets, is_router, up_name

# How far a fold may move a block's output, against how far it moves when only the second half of the fold is done. A
# right fold is exact but for norms that store w - 1, whose new weight is rounded to the type it is stored in.
_EXACT = {torch.float32: 1e-4, torch.float64: 1e-4}
_EXACT_SHORT = 2e-2
# Tokens of a trial: enough for every head, and for most experts of a fused layer.
_SHORT = 32


@dataclass(frozen=True)
class Refusal:
    """Weights whose input takes no scale, and why."""

    linears: tuple[str, ...]
    reason: str


@dataclass(frozen=True)
class _Seen:
    """What a module with weights of its own was given and gave. Tensors are kept, so that no address is used twice."""

    path: str
    module: nn.Module
    given: torch.Tensor
    made: torch.Tensor


@dataclass(frozen=True)
class _Readers:
    """The weights that read one tensor."""

    linears: tuple[str, ...]
    others: tuple[str, ...]
    first: _Seen

    @property
    def all(self) -> tuple[str, ...]:
        return self.linears + self.others


@torch.no_grad()
def find_groups(block: nn.Module, call: Call) -> tuple[list[ScalingGroup], list[Refusal]]:
    """The scaling groups of a block, tried on one call, and what takes no scale.

    It takes some dozens of forwards of the block, so a call of a few dozen tokens is best: see `short_call`.
    """
    trial = _Trial(block, call)
    groups: list[ScalingGroup] = []
    refusals: list[Refusal] = []
    for readers in _readers(trial.seen):
        found = _find_previous(trial, readers)
        if isinstance(found, ScalingGroup):
            groups.append(found)
        else:
            refusals.append(Refusal(readers.linears, found))
    for seen in trial.seen:
        if _is_experts(seen):
            within = _inside_experts(trial, seen)
            if isinstance(within, ScalingGroup):
                groups.append(within)
            else:
                refusals.append(within)
    reached = {seen.path for seen in trial.seen}
    silent = [target.path for target in find_targets(block) if target.role == "linear" and target.path not in reached]
    return groups, refusals + [Refusal((path,), "no token of the trial reached it") for path in silent]


def short_call(block: nn.Module, call: Call) -> Call:
    """The first tokens of a call alone, where the block runs on them; else the call as it is.

    What is beside the hidden state is cut wherever it is as long as the tokens or as wide as the batch.
    """
    hidden = call.hidden
    if hidden.dim() != 3 or hidden.shape[:2].numel() <= _SHORT:
        return call
    batch, length = hidden.shape[:2]

    def cut(value: Any) -> Any:
        if isinstance(value, tuple | list):
            return type(value)(cut(item) for item in value)
        if not isinstance(value, torch.Tensor) or not value.dim():
            return value
        kept = value[:1] if value.shape[0] == batch and value.dim() > 1 else value
        places = [axis for axis in range(kept.dim()) if kept.shape[axis] == length]
        # As many axes of tokens as there can be: two in a mask [.., tokens, tokens], one in anything else.
        for axis in places[-2:] if value.dim() == 4 else places[:1]:
            kept = kept.narrow(axis, 0, min(_SHORT, length))
        return kept

    short = call.with_hidden(hidden[:1, :_SHORT]).with_beside({k: cut(v) for k, v in call.beside().items()})
    try:
        same = run_block(block, short).shape[:2] == (1, min(_SHORT, length))
    except (RuntimeError, ValueError, IndexError):
        return call
    return short if same else call


class _Trial:
    """A block and one call of it: how its output moves when its weights are changed."""

    def __init__(self, block: nn.Module, call: Call) -> None:
        self.block, self.call = block, call
        self.seen = list(_watch(block, call))
        self.expected = run_block(block, call)

    def output(self, parameters: dict[str, torch.Tensor]) -> torch.Tensor:
        return first_tensor(functional_call(self.block, parameters, self.call.args, self.call.kwargs))

    def refuses(self, group: ScalingGroup) -> str:
        """Why a group does not fold; empty if it does."""
        previous = find_holder(self.block, group.previous).read()
        width = find_holder(self.block, group.consumers[0]).read().shape[-1]
        generator = torch.Generator().manual_seed(0)
        rows = previous.shape[0 if previous.dim() == 1 else -2]
        size = (group.experts, rows) if group.experts else (rows,)
        drawn = torch.exp2(torch.randint(-2, 3, size, generator=generator).float())
        scale = drawn if group.rows is None else drawn[..., group.rows]
        if scale.shape[-1] != width:
            return f"{group.previous} has {rows} rows and what reads it {width} inputs"
        moved = self.output(multiplied(self.block, group.consumers, scale)).float() - self.expected.float()
        error = self.output(folded(self.block, group, scale)).float() - self.expected.float()
        effect, rest = float(moved.square().mean().sqrt()), float(error.square().mean().sqrt())
        if not effect > 0:
            return "the block's output does not depend on it"
        allowed = _EXACT.get(previous.dtype, _EXACT_SHORT) * effect
        return "" if rest <= allowed else f"folding into {group.previous} changes the block's output"

    def doubled(self, previous: Holder, reader: _Seen) -> Callable[[torch.Tensor], torch.Tensor]:
        """What `reader` is given when the masked rows of `previous` are doubled."""
        weight, bias = previous.read(), previous.read_bias()

        def run(mask: torch.Tensor) -> torch.Tensor:
            factors = (1.0 + mask.float()).to(weight.device, weight.dtype)
            changed = {previous.parameter: previous.turn(weight * (factors if weight.dim() == 1 else factors[:, None]))}
            if bias is not None and previous.bias:
                changed[previous.bias] = bias * factors.to(bias.dtype)
            caught: list[torch.Tensor] = []
            hook = reader.module.register_forward_pre_hook(
                lambda module, args, kwargs: caught.append(first_tensor((args, kwargs))), with_kwargs=True
            )
            try:
                self.output(changed)
            finally:
                hook.remove()
            return caught[0].flatten(0, -2).float()

        return run


def first_tensor(value: Any) -> torch.Tensor:
    """The first tensor of what a module was given or gave."""
    if isinstance(value, torch.Tensor):
        return value
    items = value.values() if isinstance(value, dict) else value
    for item in items:
        if isinstance(item, torch.Tensor):
            return item
        if isinstance(item, tuple | list | dict) and item:
            return first_tensor(item)
    raise WeightError(
        f"a block that gives a {type(value).__name__} without a tensor cannot be quantised block by block"
    )


def _watch(block: nn.Module, call: Call) -> list[_Seen]:
    """Every module with weights of its own, in the order in which they end."""
    seen: list[_Seen] = []
    paths = {
        module: path for path, module in block.named_modules() if any(True for _ in module.parameters(recurse=False))
    }

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], made: Any) -> None:
        seen.append(_Seen(paths[module], module, first_tensor((args, kwargs)), first_tensor(made)))

    hooks = [module.register_forward_hook(note, with_kwargs=True) for module in paths if module is not block]
    try:
        run_block(block, call)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _address(tensor: torch.Tensor) -> tuple[int, int, int]:
    """Equal for one tensor and for views of it that keep its channels."""
    return tensor.data_ptr(), tensor.numel(), tensor.shape[-1]


def _is_experts(seen: _Seen) -> bool:
    down = getattr(seen.module, "down_proj", None)
    return isinstance(down, torch.Tensor) and down.dim() == 3


def _readers(seen: list[_Seen]) -> list[_Readers]:
    """The weights by the tensor that they read, those of a group together, in the order in which they run."""
    by_tensor: dict[tuple[int, int, int], list[_Seen]] = {}
    for one in seen:
        if _rows_and_inputs(one)[1] == one.given.shape[-1]:
            by_tensor.setdefault(_address(one.given), []).append(one)
    found = []
    for group in by_tensor.values():
        names = {one.path: f"{one.path}.{up_name(one.module)}" if _is_experts(one) else one.path for one in group}
        packed = {one.path for one in group if _is_packed(one)}
        if packed:
            linears = tuple(name for path, name in names.items() if path in packed)
            found.append(_Readers(linears, tuple(name for path, name in names.items() if path not in packed), group[0]))
    return found


def _is_packed(seen: _Seen) -> bool:
    roles = {target.role for target in find_targets(seen.module) if target.path == ""}
    return bool(roles & {"linear", "experts"}) and not is_router(seen.path, seen.module)


def _rows_and_inputs(seen: _Seen) -> tuple[int, int]:
    """The sides of a module's matrix [.., out, in]; zeros where it has none that multiplies."""
    if _is_experts(seen):
        return 0, find_holder(seen.module, up_name(seen.module)).read().shape[-1]
    weight = getattr(seen.module, "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.dim() != 2 or isinstance(seen.module, nn.Embedding):
        return 0, 0
    rows, inputs = find_holder(seen.module, "").read().shape
    return rows, inputs


def _find_previous(trial: _Trial, readers: _Readers) -> ScalingGroup | str:
    """The group of weights that read one tensor, or why there is none."""
    given, width = readers.first.given, readers.first.given.shape[-1]
    ended = [one.module for one in trial.seen].index(readers.first.module)
    own = set(readers.all)
    before = [one for one in reversed(trial.seen[:ended]) if one.path not in own]
    maker = next((one for one in before if _address(one.made) == _address(given) and _norm_width(one) == width), None)
    if maker is not None:
        for offset in (0.0, 1.0):
            group = ScalingGroup(readers.linears, maker.path, readers.others, offset)
            reason = trial.refuses(group)
            if not reason:
                return group
        return f"{reason}: something besides these weights reads its output"
    for one in before:
        rows = _norm_width(one) or _rows_and_inputs(one)[0]
        if not rows or (_norm_width(one) and rows != width):
            continue
        doubled = trial.doubled(find_holder(trial.block, one.path), readers.first)
        found = find_sources(given.flatten(0, -2).float(), doubled, rows)
        if found is not None:
            group = ScalingGroup(readers.linears, one.path, readers.others, rows=found)
            reason = trial.refuses(group)
            return reason or group
    entered = {_address(tensor) for tensor in _tensors((trial.call.args, trial.call.kwargs))}
    if _address(given) in entered:
        return "its input is the block's own input, which no weight of the block makes"
    return "no weight before it passes a factor on to its input: what lies between is not linear"


def _norm_width(seen: _Seen) -> int:
    weight = getattr(seen.module, "weight", None)
    return weight.shape[0] if isinstance(weight, torch.Tensor) and weight.dim() == 1 else 0


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, tuple | list | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)


def _inside_experts(trial: _Trial, seen: _Seen) -> ScalingGroup | Refusal:
    """Fused experts: from the half of the first weight that is not gated into the second."""
    up, down = f"{seen.path}.{up_name(seen.module)}", f"{seen.path}.down_proj"
    experts, rows, _ = find_holder(trial.block, up).read().shape
    width = find_holder(trial.block, down).read().shape[-1]
    order = torch.arange(rows)
    for part in (order[-width:], order[:width], order[1::2], order[::2]):
        group = ScalingGroup((down,), up, rows=part, experts=experts)
        if len(part) == width and not trial.refuses(group):
            return group
    return Refusal((down,), "no half of the weight before it passes a factor on: what lies between is not linear")
