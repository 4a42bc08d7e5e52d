"""Inputs: which linears of a block get the very same tensor, in which order they run, and the statistics of what they get.

A pass that is made for the inputs of one group of linears ends where the last of them is called: the norm is all that is
computed for query, key and value, the attention for the output projection, and only the next block needs the whole.
What the linears get in full precision is collected in one pass for all groups, before the first of them is rounded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from lowbit.algorithms.statistics import Statistics
from lowbit.models.capture import Call, Given, Stored, loaded, watch_block
from lowbit.models.groups import short_call

# The inputs of some linears by path: a tensor for each time that they are called.
Inputs = dict[str, list[torch.Tensor]]
Kept = dict[str, list[torch.Tensor | Stored]]
Keep = Callable[[torch.Tensor, str], torch.Tensor | Stored]


@dataclass(frozen=True)
class InputGroups:
    """Paths of modules by the tensor that they get, in the order in which they run; those that did not run come last.

    `visits` says how often each is called in one pass.
    """

    paths: list[list[str]]
    visits: dict[str, int]


@dataclass
class FullPass:
    """A block in full precision: what it gives for every call, and what the first linear of each group gets there."""

    outputs: list[torch.Tensor | Stored]
    inputs: list[Kept]


def find_input_groups(block: nn.Module, call: Call, paths: list[str]) -> InputGroups:
    """The groups of some linears. A few tokens are enough for it, unless they leave out an expert."""
    found = _find_groups(block, short_call(block, call), paths)
    return found if all(found.visits.values()) else _find_groups(block, call, paths)


def _find_groups(block: nn.Module, call: Call, paths: list[str]) -> InputGroups:
    seen: list[tuple[torch.Tensor, list[str]]] = []
    inputs = _inputs_of(block, call, dict.fromkeys(paths, 0))[0]
    for path, tensors in inputs.items():
        group = next((group for tensor, group in seen if tensor is tensors[0]), None)
        if group is None:
            seen.append((tensors[0], [path]))
        else:
            group.append(path)
    groups = [group for _, group in seen] + [[path] for path in paths if path not in inputs]
    return InputGroups(groups, {path: len(inputs.get(path, ())) for path in paths})


def _inputs_of(block: nn.Module, call: Call, visits: Mapping[str, int]) -> tuple[Inputs, torch.Tensor | None]:
    """What modules are given (path -> how often, 0: not known), in the order in which they run; and what the block gives."""
    modules = {path: block.get_submodule(path) for path in visits}
    seen = watch_block(block, call, {module: visits[path] for path, module in modules.items()})
    order = list(seen.given)
    ran = sorted(
        (path for path, module in modules.items() if module in seen.given), key=lambda p: order.index(modules[p])
    )
    return {path: [first_given(given) for given in seen.given[modules[path]]] for path in ran}, seen.output


def first_given(given: Given) -> torch.Tensor:
    """The input of a linear, which may be called by keyword."""
    args, kwargs = given
    found: torch.Tensor = args[0] if args else next(iter(kwargs.values()))
    return found


def collect_full(block: nn.Module, calls: list[Call], visits: dict[str, int], whole: bool, keep: Keep) -> FullPass:
    """What linears (path -> how often they are called) get in full precision, and, if the `whole` block is run, what it gives."""
    found = FullPass([], [])
    wanted = dict.fromkeys(visits, 0) if whole else visits
    for index, call in enumerate(calls):
        inputs, output = _inputs_of(block, call, wanted)
        found.inputs.append(
            {
                path: [keep(tensor, f"inputs_{index}_{path}_{place}") for place, tensor in enumerate(tensors)]
                for path, tensors in inputs.items()
            }
        )
        if whole and output is not None:
            found.outputs.append(keep(output, f"targets_{index}"))
    return found


def collect(
    block: nn.Module,
    calls: list[Call],
    widths: dict[str, int],
    visits: dict[str, int],
    hessian: bool,
    full: list[Kept] | None = None,
) -> dict[str, Statistics]:
    """The statistics of what modules (path -> in_features) get over all calls.

    `full`: what they get in full precision, call by call. It is let go as it is used.
    """
    device = calls[0].hidden.device
    found = {path: Statistics(width, device, hessian, full is not None) for path, width in widths.items()}
    for index, call in enumerate(calls):
        inputs, _ = _inputs_of(block, call, {path: visits[path] for path in widths})
        for path, tensors in inputs.items():
            others = full[index].pop(path, []) if full is not None else []
            pairs = others if len(others) == len(tensors) else [None] * len(tensors)
            for tensor, other in zip(tensors, pairs, strict=True):
                found[path].add_(tensor, None if other is None else loaded(other))
    return found
