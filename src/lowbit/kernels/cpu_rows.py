"""The CPU row: the compiled core behind torch tensors.

`core.calls` speaks in addresses and imports no torch, so that the engine can use it alone; this file turns tensors into addresses.
The prepared form is one plain uint8 buffer laid out for wide loads; the experts of a 3-D weight lie in it one after another. It
takes the place of the canonical buffers, and the engine of the same model reads the same buffer, so a weight lies in memory once.

The core rounds each row of activations with a scale of its own; layers with a fixed range have a row of the table for themselves
(`fixed_rows`). Where a weight keeps its inputs in another order (GPTQ's act-order), x is brought into that order first.
"""

from __future__ import annotations

import torch

from lowbit.core import calls, threads
from lowbit.core.arena import weight_memory
from lowbit.core.library import library_path
from lowbit.core.tensors import DTYPE_NAMES, addresses, as_rows, rows_of
from lowbit.errors import KernelError
from lowbit.formats import Format
from lowbit.packing import PackedTensor, empty_buffers

PREPARED = "prepared"
ORDER = "order"


def refuses(format: Format, shape: tuple[int, ...], compute: str) -> str | None:
    if library_path() is None:
        return "the compiled core is not installed; reinstall lowbit with a C++17 compiler at hand"
    return calls.refuses(format, shape, compute)


def prepare(packed: PackedTensor) -> dict[str, torch.Tensor]:
    calls.say_if_slow()
    rows, cols = packed.shape[-2:]
    size = calls.prepared_bytes(packed.format, rows, cols)
    experts = _experts(packed)
    prepared = torch.from_numpy(weight_memory(size * len(experts)))
    for index, expert in enumerate(experts):
        tensors = {name: tensor.contiguous() for name, tensor in expert.tensors().items()}
        place = prepared.data_ptr() + index * size
        calls.prepare(packed.format, rows, cols, addresses(tensors), place, size)
    return {PREPARED: prepared} | ({} if packed.order is None else {ORDER: packed.order})


def restore(buffers: dict[str, torch.Tensor], format: Format, shape: tuple[int, ...]) -> PackedTensor:
    prepared = buffers[PREPARED]
    packed = PackedTensor(format, shape, **empty_buffers(format, shape, torch), order=buffers.get(ORDER))
    experts = _experts(packed)
    size = prepared.numel() // len(experts)
    for index, expert in enumerate(experts):
        calls.restore(prepared.data_ptr() + index * size, size, addresses(expert.tensors()))
    return packed


def expert(
    buffers: dict[str, torch.Tensor], format: Format, shape: tuple[int, ...], index: int
) -> dict[str, torch.Tensor]:
    """The buffers of one matrix of a 3-D weight, sharing memory."""
    prepared = buffers[PREPARED]
    size = prepared.numel() // shape[0]
    return buffers | {PREPARED: prepared[index * size : (index + 1) * size]}


def rows(buffers: dict[str, torch.Tensor], format: Format, shape: tuple[int, ...], ids: torch.Tensor) -> torch.Tensor:
    """Rows of a weight [out, in] in fp32."""
    prepared, wanted = buffers[PREPARED], ids.to(torch.int64).contiguous()
    found = torch.empty(len(wanted), shape[1])
    calls.read_rows(prepared.data_ptr(), prepared.numel(), wanted.data_ptr(), len(wanted), found.data_ptr())
    return torch.empty_like(found).index_copy_(1, buffers[ORDER].long(), found) if ORDER in buffers else found


def run(
    x: torch.Tensor, buffers: dict[str, torch.Tensor], format: Format, shape: tuple[int, ...], compute: str
) -> torch.Tensor:
    """x [.., in] times a prepared weight [out, in]: [.., out] in the type of x."""
    check_input(x, shape)
    flat = as_rows(_as_it_enters(x, buffers))
    y = torch.empty(flat.shape[0], shape[0], dtype=flat.dtype)
    multiply(buffers[PREPARED], flat, y, compute)
    return y.view(*x.shape[:-1], shape[0]).to(x.dtype)


def multiply(prepared: torch.Tensor, x: torch.Tensor, y: torch.Tensor, compute: str) -> None:
    """Write x [rows, in] times a prepared weight into y [rows, out]."""
    if len(x):
        threads.follow(torch.get_num_threads())
        calls.run(prepared.data_ptr(), prepared.numel(), rows_of(x), rows_of(y), compute=compute)


def run_experts(
    x: torch.Tensor,
    buffers: dict[str, torch.Tensor],
    format: Format,
    shape: tuple[int, ...],
    begins: torch.Tensor,
    compute: str,
) -> torch.Tensor:
    """Rows sorted by expert times the expert of each, as in the reference: one call for all of them."""
    check_input(x, shape)
    known = _as_it_enters(x.detach(), buffers).contiguous()
    y = torch.zeros(len(x), shape[-2], dtype=known.dtype)
    threads.follow(torch.get_num_threads())
    edges = begins.to("cpu", torch.int64).contiguous()
    prepared = buffers[PREPARED]
    stack = calls.Experts(prepared.data_ptr(), prepared.numel() // shape[0], shape[0], edges.data_ptr())
    calls.run_experts(stack, rows_of(known), rows_of(y), compute)
    return y.to(x.dtype)


def _as_it_enters(x: torch.Tensor, buffers: dict[str, torch.Tensor]) -> torch.Tensor:
    """x in a type that the core reads, its inputs in the order of the weight's columns."""
    known = x if x.dtype in DTYPE_NAMES else x.float()
    return known.index_select(-1, buffers[ORDER].long()) if ORDER in buffers else known


def check_input(x: torch.Tensor, shape: tuple[int, ...]) -> None:
    """Refuse what the core would read beyond, or could not read at all: it is told an address, not what lies there."""
    if x.shape[-1] != shape[-1]:
        raise KernelError(f"x of shape {list(x.shape)} does not fit a weight {list(shape)}: it has {shape[-1]} inputs")
    if x.device.type != "cpu":
        raise KernelError(f"x is on {x.device} and the weight is on the CPU: move one to the other")


def _experts(packed: PackedTensor) -> list[PackedTensor]:
    """The matrices of a weight: itself, or one for each expert, sharing memory."""
    return [packed] if len(packed.shape) == 2 else [packed.expert(index) for index in range(packed.shape[0])]
