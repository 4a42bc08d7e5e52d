"""Trials: how much error a scale leaves in a group of linears, before anything is folded.

    W^ = round(W s) / s        what the linears of a group amount to once s is folded and they are rounded
    loss = |f(x, W^) - f(x, W)|^2 / |f(x, W)|^2        f: the parent, the largest module with all of them and not `previous`

so that queries and keys are judged by the attention that they make, gate and up by their MLP. x stays, and only the
weights are put in place of others for one call. `round` is the rounding that is really asked for, with the importance
of the scaled inputs, mean x^2 / s^2. The second weights of fused experts are tried expert by expert, each on the tokens
that are routed to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import nn
from torch.func import functional_call

from lowbit.algorithms.rtn import importance_of, round_by_search
from lowbit.algorithms.scaling import Round, collect_inputs, some_of
from lowbit.algorithms.statistics import Statistics
from lowbit.algorithms.table import BlockWork
from lowbit.formats import Format
from lowbit.kernels.reference import round_activations
from lowbit.models.capture import Call, watch_calls
from lowbit.models.folding import ScalingGroup, find_holder, fold_scale_
from lowbit.models.groups import find_groups, first_tensor, short_call
from lowbit.models.walk import gate_of


class Trial(Protocol):
    """What a search of scales needs to know."""

    group: ScalingGroup
    formats: dict[str, Format]
    statistics: Statistics

    @property
    def weights(self) -> dict[str, torch.Tensor]: ...

    def loss(self, scale: torch.Tensor | None) -> float: ...


Search = Callable[[Trial], tuple[torch.Tensor | None, str]]


def scale_groups_(work: BlockWork, scaler: str, tokens: int, search: Search) -> dict[str, str]:
    """Search and fold a scale for each group of a block, one after another. Gives a note for each weight."""
    formats = work.formats | work.experts
    groups, notes = groups_of(work, scaler)
    for place, group in enumerate(groups, 1):
        work.tell(f"{scaler}, group {place} of {len(groups)}", 0.0)
        asked = [name for name in group.linears if name in formats]
        if not asked:
            continue
        if group.experts:
            scale, found = _search_experts(work, group, tokens, search)
        else:
            scale, found = search(GroupTrial(work.block, group, formats, work.calls, tokens))
        if scale is not None:
            fold_scale_(work.block, group, scale)
        notes |= dict.fromkeys(asked, f"{scaler}: {found}")
    return {name: note for name, note in notes.items() if name in formats}


def groups_of(work: BlockWork, scaler: str) -> tuple[list[ScalingGroup], dict[str, str]]:
    """The groups of a block that may be scaled, and notes for the weights that may not."""
    groups, refusals = find_groups(work.block, short_call(work.block, work.calls[0]))
    notes = {name: refusal.reason for refusal in refusals for name in refusal.linears}
    free = []
    for group in groups:
        parameters = [find_holder(work.block, name).parameter for name in (group.previous, *group.consumers)]
        shared = [name for name in parameters if name in work.shared]
        if shared:
            notes |= dict.fromkeys(group.linears, f"{shared[0]} is the weight of another block too")
        else:
            free.append(group)
    return free, {name: f"{scaler}: not scaled, {reason}" for name, reason in notes.items()}


class GroupTrial:
    """A group, the calls of its parent, and the loss of a scale over about `tokens` tokens."""

    def __init__(
        self,
        block: nn.Module,
        group: ScalingGroup,
        formats: dict[str, Format],
        calls: Sequence[Call],
        tokens: int,
        round: Round = round_by_search,
    ) -> None:
        self.group, self.round = group, round
        self.holders = {name: find_holder(block, name) for name in group.linears if name in formats}
        self.formats = {name: formats[name] for name in self.holders}
        self.path = parent_of(block, group)
        self.parent = block.get_submodule(self.path)
        first = next(iter(self.holders.values()))
        statistics = collect_inputs(block, calls, first.target.module)
        assert statistics is not None, "a group was found by running its linears"
        self.statistics = statistics
        seen = watch_calls(block, some_of(calls, tokens), [self.parent])
        self.calls = [given for one in seen for given in one.given.get(self.parent, ())]
        with torch.no_grad():
            self.targets = [self._output({}, args, kwargs) for args, kwargs in self.calls]
        self.size = sum(float(target.float().square().sum()) for target in self.targets)

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        return {name: holder.read().detach().float() for name, holder in self.holders.items()}

    @torch.no_grad()
    def loss(self, scale: torch.Tensor | None) -> float:
        """The relative squared error of the parent's output when this scale (None: none) is folded and weights are rounded."""
        changed, square = {}, importance_of(self.statistics)
        error = torch.zeros((), dtype=torch.float64, device=square.device)
        for name, weight in self.weights.items():
            holder = self.holders[name]
            rounded = round_scaled(self.round, weight, self.formats[name], square, scale)
            path = holder.parameter.removeprefix(f"{self.path}.")
            changed[path] = holder.turn(rounded.to(holder.read().dtype))
        with self._rounded_inputs(scale):
            for (args, kwargs), target in zip(self.calls, self.targets, strict=True):
                error += (self._output(changed, args, kwargs).float() - target.float()).square().sum()
        return float(error) / self.size if self.size else 0.0

    def _output(self, changed: dict[str, torch.Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        return first_tensor(functional_call(self.parent, changed, args, kwargs))

    @contextmanager
    def _rounded_inputs(self, scale: torch.Tensor | None) -> Iterator[None]:
        """Inside, linears whose format rounds activations (w8a8) get x / s rounded, times s."""

        def rounding(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            factor = 1.0 if scale is None else scale
            return ((round_activations(args[0].float() / factor) * factor).to(args[0].dtype), *args[1:])

        modules = [self.holders[name].target.module for name, format in self.formats.items() if format.act_bits < 16]
        hooks = [module.register_forward_pre_hook(rounding) for module in modules]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


class ExpertTrial:
    """The second weight of one expert [out, in] on the tokens that reach it, x [tokens, in]."""

    def __init__(
        self, group: ScalingGroup, format: Format, weight: torch.Tensor, x: torch.Tensor, round: Round = round_by_search
    ) -> None:
        (name,) = group.linears
        self.group, self.formats, self.weights, self.x, self.round = (
            group,
            {name: format},
            {name: weight.float()},
            x,
            round,
        )
        self.statistics = Statistics(x.shape[-1], x.device, hessian=False)
        self.statistics.add_(x)
        self.size = float((x @ weight.float().t()).square().sum())

    @torch.no_grad()
    def loss(self, scale: torch.Tensor | None) -> float:
        (name, weight), *_ = self.weights.items()
        rounded = round_scaled(self.round, weight, self.formats[name], importance_of(self.statistics), scale)
        error = float((self.x @ (rounded - weight).t()).square().sum())
        return error / self.size if self.size else 0.0


def round_scaled(
    round: Round, weight: torch.Tensor, format: Format, square: torch.Tensor, scale: torch.Tensor | None
) -> torch.Tensor:
    """round(W s) / s, by the importance of x / s. `square` [in] is the mean of x^2."""
    if scale is None:
        return round(weight, format, square)
    return round(weight * scale, format, square / scale.square()) / scale


def expert_inputs(work: BlockWork, group: ScalingGroup, tokens: int) -> list[torch.Tensor]:
    """What the second weight of each expert of a group gets: [tokens, in] for each expert, empty for one that was not reached."""
    first, second = find_holder(work.block, group.previous), find_holder(work.block, group.linears[0])
    module = second.target.module
    seen = watch_calls(work.block, some_of(work.calls, tokens), [module])
    given = [(*args, *kwargs.values())[:2] for one in seen for args, kwargs in one.given.get(module, ())]
    hidden = torch.cat([x.flatten(0, -2) for x, _ in given])
    chosen = torch.cat([which.flatten(0, -2) for _, which in given])
    weight, bias, gate = first.read().detach(), first.read_bias(), gate_of(module)
    inputs = []
    with torch.no_grad():
        for index in range(group.experts):
            x = hidden[(chosen == index).any(-1)]
            inputs.append(gate(nn.functional.linear(x, weight[index], None if bias is None else bias[index])).float())
    return inputs


def _search_experts(
    work: BlockWork, group: ScalingGroup, tokens: int, search: Search
) -> tuple[torch.Tensor | None, str]:
    """A scale for each expert [experts, in]: none for those that no token reached, or that no scale makes better."""
    (name,) = group.linears
    weight = find_holder(work.block, name).read().detach()
    scales, scaled = torch.ones(group.experts, weight.shape[-1], device=weight.device), 0
    for index, x in enumerate(expert_inputs(work, group, tokens)):
        if len(x):
            scale, _ = search(ExpertTrial(group, work.experts[name], weight[index], x))
            scaled += scale is not None
            scales[index] = scales[index] if scale is None else scale
    return (scales if scaled else None), f"{scaled} of {group.experts} experts have a scale"


def parent_of(block: nn.Module, group: ScalingGroup) -> str:
    """The path of the largest module that has all of a group's weights and not `previous`; else of the smallest with all."""
    modules = dict(block.named_modules())
    paths = [name if name in modules else name.rpartition(".")[0] for name in group.consumers]
    shared: list[str] = []
    for parts in zip(*(path.split(".") for path in paths), strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    candidates = [".".join(shared[:count]) for count in range(len(shared) + 1)]
    runs = [path for path in candidates if not isinstance(modules[path], nn.ModuleList | nn.ModuleDict)]
    apart = [path for path in runs if path and not f"{group.previous}.".startswith(f"{path}.")]
    return apart[0] if apart else runs[-1]
