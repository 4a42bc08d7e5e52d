"""The CPU row: the compiled core behind torch tensors.

`cpu.py` speaks in addresses and imports no torch, so that the engine can use it alone; this file turns tensors into
addresses. The prepared form is one plain uint8 buffer laid out for wide loads. It takes the place of the canonical
buffers, and the engine of the same model reads the same buffer, so a weight lies in memory once.
"""

from __future__ import annotations

import torch

from lowbit.formats import Format
from lowbit.kernels import cpu
from lowbit.kernels.core import library_path
from lowbit.packing import PackedTensor, empty_buffers

_DTYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
_PREPARED = "prepared"


def refuses(format: Format, shape: tuple[int, ...], compute: str) -> str | None:
    if library_path() is None:
        return "the compiled core is not installed; reinstall lowbit with a C++17 compiler at hand"
    return cpu.refuses(format, shape, compute)


def prepare(packed: PackedTensor) -> dict[str, torch.Tensor]:
    rows, cols = packed.shape
    size = cpu.prepared_bytes(packed.format, rows, cols)
    prepared = torch.empty(size, dtype=torch.uint8)
    tensors = {name: tensor.contiguous() for name, tensor in packed.tensors().items()}
    cpu.prepare(packed.format, rows, cols, addresses(tensors), prepared.data_ptr(), size)
    return {_PREPARED: prepared}


def restore(buffers: dict[str, torch.Tensor], format: Format, shape: tuple[int, ...]) -> PackedTensor:
    prepared = buffers[_PREPARED]
    canonical = empty_buffers(format, shape, torch)
    cpu.restore(prepared.data_ptr(), prepared.numel(), addresses(canonical))
    return PackedTensor(format, shape, **canonical)


def run(
    x: torch.Tensor, buffers: dict[str, torch.Tensor], format: Format, shape: tuple[int, ...], compute: str
) -> torch.Tensor:
    """x [.., in] times a prepared weight [out, in]: [.., out] in the type of x."""
    prepared = buffers[_PREPARED]
    known = x if x.dtype in _DTYPE_NAMES else x.float()
    flat = known.detach().reshape(-1, shape[1])
    if flat.stride(-1) != 1:
        flat = flat.contiguous()
    y = torch.empty(flat.shape[0], shape[0], dtype=flat.dtype)
    if flat.shape[0]:
        name = _DTYPE_NAMES[flat.dtype]
        given = cpu.Rows(flat.data_ptr(), name, flat.shape[0], shape[1], flat.stride(0))
        cpu.run(prepared.data_ptr(), prepared.numel(), given, cpu.Rows(y.data_ptr(), name, *y.shape), compute=compute)
    return y.view(*x.shape[:-1], shape[0]).to(x.dtype)


def addresses(tensors: dict[str, torch.Tensor]) -> cpu.Canonical:
    """Where the canonical buffers of a weight lie."""
    names = ("codes", "scales", "zeros", "scale_scales")
    return cpu.Canonical(**{name: tensors[name].data_ptr() for name in names if name in tensors})
