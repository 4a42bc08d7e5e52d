"""Inputs: which linears of a block get the very same tensor, in which order they run, and the statistics of what they get."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lowbit.algorithms.statistics import Statistics
from lowbit.models.capture import Call, run_block

Inputs = dict[str, list[torch.Tensor]]


def find_input_groups(block: nn.Module, call: Call, paths: list[str]) -> list[list[str]]:
    """Paths of modules by the tensor that they get, in the order in which they run; those that did not run come last."""
    seen: list[tuple[torch.Tensor, list[str]]] = []
    with capturing(block, paths) as inputs:
        run_block(block, call)
    for path, tensors in inputs.items():
        group = next((group for tensor, group in seen if tensor is tensors[0]), None)
        if group is None:
            seen.append((tensors[0], [path]))
        else:
            group.append(path)
    return [group for _, group in seen] + [[path] for path in paths if path not in inputs]


@contextmanager
def capturing(block: nn.Module, paths: list[str]) -> Iterator[Inputs]:
    """Inside, every input of some modules is kept, by path in the order in which they run."""
    inputs: Inputs = {}

    def hook_of(path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inputs.setdefault(path, []).append(args[0] if args else next(iter(kwargs.values())))

        return hook

    hooks = [block.get_submodule(path).register_forward_pre_hook(hook_of(path), with_kwargs=True) for path in paths]
    try:
        yield inputs
    finally:
        for hook in hooks:
            hook.remove()


def collect(
    block: nn.Module,
    calls: list[Call],
    widths: dict[str, int],
    hessian: bool,
    full: tuple[nn.Module, list[Call]] | None = None,
) -> dict[str, Statistics]:
    """The statistics of what modules (path -> in_features) get over all calls.

    `full` is the block as it was in full precision, with its own calls: what the inputs would be without rounding.
    """
    device = calls[0].hidden.device
    found = {path: Statistics(width, device, hessian, full is not None) for path, width in widths.items()}
    for index, call in enumerate(calls):
        wanted: Inputs = {}
        if full is not None:
            with capturing(full[0], list(widths)) as wanted:
                run_block(full[0], full[1][index])
        with capturing(block, list(widths)) as inputs:
            run_block(block, call)
        for path, tensors in inputs.items():
            others = wanted.get(path, [])
            for place, tensor in enumerate(tensors):
                found[path].add_(tensor, others[place] if len(others) == len(tensors) else None)
    return found
