"""Smoothing from what was observed: which factors, into which weights they fold, and what a weight is once they are in.

    s = (max |x|)^alpha / (max |W|)^(1 - alpha)        as in algorithms/smoothquant, per input of the linears that share one

Groups are found as everywhere (`models.groups`): block by block where the model has a chain of blocks, else over the whole of a
small model. Folding does not depend on an order, so factors can be worked out today and folded another day: every weight is
multiplied along its columns and divided along its rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from lowbit.errors import LowbitError, WeightError
from lowbit.interop.qconf_summary import FoldPlace, LinearSummary
from lowbit.models.capture import Call, find_blocks, record_calls
from lowbit.models.folding import ScalingGroup, find_holder, folded
from lowbit.models.groups import find_groups, first_tensor

_LEAST = 1e-5
_TRIAL_TOKENS = 32
# Without blocks every weight before a linear may be behind its inputs, and each is tried by running all of the model.
_MOST_LINEARS_WITHOUT_BLOCKS = 16


@dataclass(frozen=True, eq=False)
class Fold:
    """A group, named from the model on, and the factor [in] of its columns."""

    group: ScalingGroup
    scale: torch.Tensor


def find_model_groups(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[ScalingGroup]:
    """The groups of a model that runs on these inputs, named from the model on; none where no blocks are found in a large one."""
    ids = _token_ids(args, kwargs)
    found: list[ScalingGroup] = []
    if ids is not None:
        try:
            blocks = find_blocks(model, ids)
            calls = record_calls(model, blocks, ids[:1, :_TRIAL_TOKENS])
        except LowbitError:
            return []
        for name, call in zip(blocks, calls, strict=True):
            groups, _ = find_groups(model.get_submodule(name), call)
            found += [_from_model(group, name) for group in groups if not group.experts]
        return found
    if sum(isinstance(module, nn.Linear) for module in model.modules()) > _MOST_LINEARS_WITHOUT_BLOCKS:
        return []
    slot = next((i for i, value in enumerate(args) if isinstance(value, torch.Tensor)), None)
    place = slot if slot is not None else next((k for k, v in kwargs.items() if isinstance(v, torch.Tensor)), None)
    if place is None:
        return []
    try:
        groups, _ = find_groups(model, Call(args, kwargs, place))
    except (LowbitError, WeightError):
        return []
    return [group for group in groups if not group.experts]


def _token_ids(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor | None:
    """The token ids [n, length] among the inputs of a language model."""
    for value in (kwargs.get("input_ids"), *args[:1]):
        if isinstance(value, torch.Tensor) and value.dim() == 2 and not value.is_floating_point():
            return value
    return None


def _from_model(group: ScalingGroup, block: str) -> ScalingGroup:
    def named(names: Sequence[str]) -> tuple[str, ...]:
        return tuple(f"{block}.{name}" for name in names)

    return replace(
        group, linears=named(group.linears), previous=f"{block}.{group.previous}", others=named(group.others)
    )


def work_out_folds(
    model: nn.Module, groups: Sequence[ScalingGroup], largest: Mapping[str, torch.Tensor], alpha: float
) -> list[Fold]:
    """The factors of an alpha; `largest` [in] is the largest |x| of each linear's inputs, by its path."""
    folds = []
    for group in groups:
        if not all(path in largest for path in group.linears):
            continue
        x = torch.stack([largest[path] for path in group.linears]).amax(0)
        weights = torch.stack(
            [find_holder(model, path).read().detach().float().abs().amax(0) for path in group.linears]
        )
        scale = x.clamp_min(_LEAST).pow(alpha) / weights.amax(0).clamp_min(_LEAST).pow(1 - alpha)
        folds.append(Fold(group, group.tie(torch.where(x == 0, torch.ones_like(scale), scale.clamp_min(_LEAST)))))
    return folds


class FoldedWeights:
    """The weights of a model as they are once some folds are in, one at a time and in fp32; the model stays as it is."""

    def __init__(self, model: nn.Module, folds: Sequence[Fold]) -> None:
        self.model = model
        self.columns: dict[str, torch.Tensor] = {}
        self.rows: dict[str, Fold] = {}
        for fold in folds:
            self.columns |= dict.fromkeys(fold.group.consumers, fold.scale)
            self.rows[fold.group.previous] = fold

    def read(self, path: str) -> torch.Tensor:
        """The weight [out, in] of a linear."""
        weight = find_holder(self.model, path).read().detach().float()
        if path in self.columns:
            weight = weight * self.columns[path].to(weight.device)
        if path in self.rows:
            fold = self.rows[path]
            weight = weight / fold.group.factors(fold.scale.to(weight.device), len(weight)).unsqueeze(-1)
        return weight


def fold_(model: nn.Module, folds: Sequence[Fold]) -> None:
    """Put folds into a model. Its parameters get new numbers, and what shared the old ones keeps them."""
    for fold in folds:
        parameters = dict(model.named_parameters(remove_duplicate=False))
        for name, changed in folded(model, fold.group, fold.scale).items():
            parameters[name].data = changed.contiguous()


def folds_of(model: nn.Module, linears: Sequence[LinearSummary], unplaced: Sequence[ScalingGroup] = ()) -> list[Fold]:
    """The folds that a summary asks for. Files that say no place get it from `unplaced`, the groups of the model."""
    placed: dict[str, list[LinearSummary]] = {}
    by_path = {linear.path: linear for linear in linears}
    for linear in linears:
        if linear.place is not None and linear.factors:
            placed.setdefault(linear.place.group, []).append(linear)
    folds = [_fold_at(members) for members in placed.values()]
    for group in unplaced:
        members = [by_path[path] for path in group.linears if path in by_path and by_path[path].factors]
        if len(members) == len(group.linears) and not any(member.place for member in members):
            scale = torch.tensor(members[0].factors)
            same = all(torch.allclose(torch.tensor(m.factors), scale, rtol=1e-3) for m in members)
            if same and torch.allclose(group.tie(scale), scale, rtol=1e-3):
                folds.append(Fold(group, scale))
    return folds


def _fold_at(members: list[LinearSummary]) -> Fold:
    place = members[0].place
    assert place is not None
    rows = None if place.rows is None else torch.tensor(place.rows)
    group = ScalingGroup(tuple(m.path for m in members), place.previous, place.others, place.offset, rows)
    return Fold(group, torch.tensor(members[0].factors))


def place_of(group: ScalingGroup) -> FoldPlace:
    """Where a group folds, as a file says it."""
    rows = None if group.rows is None else tuple(group.rows.tolist())
    return FoldPlace(group.linears[0], group.previous, group.others, group.offset, rows)


def first_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    return first_tensor((args, kwargs))
