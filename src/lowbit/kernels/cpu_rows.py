"""The CPU row: the compiled core behind torch tensors.

`cpu.py` speaks in pointers and imports no torch, so that the engine can use it alone; this file turns tensors into pointers and
back. The prepared form is one plain uint8 buffer, laid out for wide loads, which the engine shares.
"""

from __future__ import annotations

import torch

from lowbit.formats import Format
from lowbit.packing import PackedTensor


def refuses(format: Format, shape: tuple[int, ...], compute: str) -> str | None:
    return "the compiled core has no product for it yet"


def prepare(packed: PackedTensor) -> dict[str, torch.Tensor]:
    return packed.tensors()


def restore(buffers: dict[str, torch.Tensor], format: Format, shape: tuple[int, ...]) -> PackedTensor:
    return PackedTensor(format, shape, **buffers)


def run(
    x: torch.Tensor, buffers: dict[str, torch.Tensor], format: Format, shape: tuple[int, ...], compute: str
) -> torch.Tensor:
    raise NotImplementedError
