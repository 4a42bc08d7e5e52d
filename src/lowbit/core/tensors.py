"""Tensors of torch as what the core takes: an address, a type, a shape and a stride. The one file of this room that imports torch.

The core reads row after row with the numbers of each side by side, and `Rows` says how far the rows lie apart. A tensor whose rows
share memory (`expand`, `unfold`) has a stride that says something else, so it is written out before its address goes anywhere.
"""

from __future__ import annotations

import torch

from lowbit.core import calls

DTYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def as_rows(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor [.., cols] as [rows, cols], in memory that the core can walk."""
    flat = tensor.detach().reshape(-1, tensor.shape[-1])
    is_apart = len(flat) < 2 or flat.stride(0) >= flat.shape[1]
    return flat if flat.stride(1) == 1 and is_apart else flat.contiguous()


def rows_of(flat: torch.Tensor) -> calls.Rows:
    """Where the numbers of `as_rows` lie."""
    step = flat.stride(0) if len(flat) > 1 else flat.shape[1]
    return calls.Rows(flat.data_ptr(), DTYPE_NAMES[flat.dtype], flat.shape[0], flat.shape[1], step)


def addresses(tensors: dict[str, torch.Tensor]) -> calls.Canonical:
    """Where the canonical buffers of a weight lie; the caller keeps them alive and contiguous."""
    return calls.Canonical.of({name: tensor.data_ptr() for name, tensor in tensors.items()})
