"""Reading: the weights of a model that lies in files are in memory while they are worked on, one block at a time.

A loader may hand over a model whose parameters are mapped from its files: nothing has been read, and pages that were read
can be given back. `read_block_` makes the parameters of a block real when it is its turn, `let_go_` drops those that
have a packed one in their place, and between the two the file's pages are given back. A model that fits into memory
anyway needs none of this, and one that somebody else holds must keep its weights, so all of it happens only for a
`Source` that the loader gives.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import nn


class Source(Protocol):
    """The files that a model is mapped from."""

    def was_read(self, nbytes: int) -> None:
        """Count what was read, and give its pages back when it is enough to be worth it."""

    def release(self) -> None:
        """Give back every page that was read."""

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor lies in the files."""


@contextmanager
def giving_back(model: nn.Module, source: Source | None) -> Iterator[None]:
    """Inside, pages are given back while the whole model runs, module by module."""
    hooks: list[Any] = []

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        assert source is not None
        source.was_read(sum(parameter.nbytes for parameter in module.parameters(recurse=False)))

    if source is not None:
        owners = [module for module in model.modules() if any(True for _ in module.parameters(recurse=False))]
        hooks = [module.register_forward_hook(hook) for module in owners]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()
        if source is not None:
            source.release()


def read_block_(block: nn.Module, source: Source | None) -> list[nn.Parameter]:
    """The parameters of a block, each with numbers of its own."""
    parameters = list(block.parameters())
    if source is not None:
        for parameter in parameters:
            if source.holds(parameter):
                parameter.data = parameter.data.clone()
        source.release()
    return parameters


def let_go_(parameters: list[nn.Parameter], block: nn.Module, source: Source | None) -> None:
    """Drop the numbers of those parameters that a block has no longer."""
    if source is not None:
        left = set(block.parameters())
        for parameter in parameters:
            if parameter not in left:
                parameter.data = parameter.data.new_empty(0)
