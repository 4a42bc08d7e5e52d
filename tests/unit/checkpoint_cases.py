"""What the tests of saving and loading share: tiny models in folders, their logits, and a disk that is full."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from lowbit_assets import tiny_model

# Widths that groups of 64 divide, so that compressed-tensors can say them.
EVEN = {"intermediate_size": 192}
EVEN_EXPERTS = {**EVEN, "moe_intermediate_size": 128}
IDS = torch.arange(3, 35)[None]


def make(family: str, folder: Path, **overrides: Any) -> Path:
    """A tiny model of a family in a folder, once."""
    return folder if folder.exists() else tiny_model(family, folder, **overrides)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    result: torch.Tensor = model(IDS).logits
    return result


@contextmanager
def small_files(limit: int) -> Iterator[None]:
    """Every file that grows past the limit fails as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
