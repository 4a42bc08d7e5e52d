"""Fused experts: each expert has its own inputs, so each gets its own statistics and its own rounding.

The first weight of an expert sees the hidden state of the tokens routed to it, the second what the first makes of them
once it is rounded. An expert that saw too few tokens is rounded to nearest, and the report says which.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from lowbit.algorithms.statistics import Statistics
from lowbit.algorithms.table import Rounded
from lowbit.models.capture import Call, watch_block
from lowbit.models.walk import Target, dense_weights, gate_of, up_name
from lowbit.packing import PackedTensor

RoundOne = Callable[[torch.Tensor, Statistics], Rounded]
# More experts than this are counted in the report instead of being named.
_MOST_NAMED = 8


def round_experts_(
    block: nn.Module, target: Target, path: str, calls: list[Call], visits: int, hessian: bool, round_one: RoundOne
) -> Iterator[tuple[str, torch.Tensor, Rounded]]:
    """Each weight of a module of experts: its name, itself and what it is rounded to. The second is rounded on what the
    first gives as the caller left it. `visits`: how often the module is called in one pass."""
    module = block.get_submodule(path)
    for suffix, weight in dense_weights(target):
        statistics = [Statistics(weight.shape[-1], weight.device, hessian) for _ in range(len(weight))]
        for call in calls:
            for args, kwargs in watch_block(block, call, {module: visits}).given.get(module, ()):
                hidden, chosen, *_ = [*args, *kwargs.values()]
                _add(statistics, target, suffix, hidden.reshape(-1, hidden.shape[-1]), chosen)
        yield suffix, weight, _round_each(weight, statistics, round_one)


def _add(statistics: list[Statistics], target: Target, suffix: str, hidden: torch.Tensor, chosen: torch.Tensor) -> None:
    """Give each expert what it gets of these tokens."""
    module: Any = target.module
    up, first = next(dense_weights(target))
    for index, own in enumerate(statistics):
        x = hidden[(chosen == index).any(-1)]
        if not len(x):
            continue
        if suffix != up_name(module):
            bias = getattr(module, f"{up}_bias", None)
            x = nn.functional.linear(x, first[index], None if bias is None else bias[index])
            x = gate_of(module)(x)
        own.add_(x)


def _round_each(weight: torch.Tensor, statistics: list[Statistics], round_one: RoundOne) -> Rounded:
    parts, reasons = [], {}
    for index, own in enumerate(statistics):
        rounded = round_one(weight[index], own)
        parts.append(rounded.packed)
        if rounded.note:
            reasons[index] = rounded.note
    named = ", ".join(map(str, reasons)) if len(reasons) <= _MOST_NAMED else f"{len(reasons)} of {len(parts)}"
    note = f"experts {named}: {next(iter(reasons.values()))}" if reasons else ""
    return Rounded(stack_experts(parts), note)


def stack_experts(parts: list[PackedTensor]) -> PackedTensor:
    """Weights [out, in] of experts as one weight [experts, out, in]."""
    tensors = {name: torch.stack([getattr(part, name) for part in parts]) for name in parts[0].tensors()}
    return PackedTensor(parts[0].format, (len(parts), *parts[0].shape), **tensors)
