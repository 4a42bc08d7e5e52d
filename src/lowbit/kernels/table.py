"""The kernel table: which code multiplies a packed weight, chosen once per layer, refused aloud.

A `Kernel` is a row: a name, a device, a function that refuses with a sentence or accepts with None, `prepare` and its
inverse `restore` between the canonical buffers and whatever the kernel reads, and `run`. A layer holds one form at a
time, so prepared weights never cost memory twice, and only the canonical form is saved, sharded or exported.

    KERNELS[device type] = rows in order of preference; the last is always `reference`, which refuses nothing

`choose` walks the rows when a layer is prepared, never inside `forward`. A kernel asked for by name that refuses
raises.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from lowbit.errors import KernelError, nearest
from lowbit.formats import Format
from lowbit.kernels import cpu_rows, fixed_rows, reference
from lowbit.packing import PackedTensor

Buffers = dict[str, torch.Tensor]
# How activations meet weights inside a kernel. "auto" leaves the choice to the row.
COMPUTE = ("auto", "fp32", "bf16", "fp16", "int8")


@dataclass(frozen=True)
class Kernel:
    """One way to multiply by a packed weight."""

    name: str
    refuses: Callable[[Format, tuple[int, ...], str], str | None]
    prepare: Callable[[PackedTensor], Buffers]
    restore: Callable[[Buffers, Format, tuple[int, ...]], PackedTensor]
    run: Callable[[torch.Tensor, Buffers, Format, tuple[int, ...], str], torch.Tensor]
    rows: Callable[[Buffers, Format, tuple[int, ...], torch.Tensor], torch.Tensor]
    expert: Callable[[Buffers, Format, tuple[int, ...], int], Buffers]
    run_experts: Callable[[torch.Tensor, Buffers, Format, tuple[int, ...], torch.Tensor, str], torch.Tensor]


REFERENCE = Kernel(
    "reference",
    reference.refuses,
    reference.prepare,
    reference.restore,
    reference.run,
    reference.rows,
    reference.expert,
    reference.run_experts,
)
CORE = Kernel(
    "core",
    cpu_rows.refuses,
    cpu_rows.prepare,
    cpu_rows.restore,
    cpu_rows.run,
    cpu_rows.rows,
    cpu_rows.expert,
    cpu_rows.run_experts,
)
FIXED = Kernel(
    "core_fixed",
    fixed_rows.refuses,
    fixed_rows.prepare,
    fixed_rows.restore,
    fixed_rows.run,
    fixed_rows.rows,
    fixed_rows.expert,
    fixed_rows.run_experts,
)

KERNELS: dict[str, tuple[Kernel, ...]] = {
    "cpu": (CORE, FIXED, REFERENCE),
    "cuda": (REFERENCE,),
    "xpu": (REFERENCE,),
}
_BY_NAME = {row.name: row for rows in KERNELS.values() for row in rows}


def rows_for(device: str) -> Sequence[Kernel]:
    """The rows of a device type; a device without rows of its own is served by `reference`."""
    return KERNELS.get(device, (REFERENCE,))


def kernel_named(name: str) -> Kernel:
    if name not in _BY_NAME:
        raise KernelError(f"no kernel is called {name!r}: {nearest(name, _BY_NAME)}")
    return _BY_NAME[name]


def choose(
    format: Format, shape: tuple[int, ...], device: str, compute: str = "auto", name: str | None = None
) -> Kernel:
    """The first row of a device that takes a weight, or the one asked for by name."""
    if compute not in COMPUTE:
        raise KernelError(f"compute={compute!r} is not known: {nearest(compute, COMPUTE)}")
    rows = rows_for(device)
    if name is not None:
        row = kernel_named(name)
        reason = row.refuses(format, shape, compute) if row in rows else f"it has no row for the device {device!r}"
        if reason:
            raise KernelError(f"kernel {name!r} cannot run a {format} weight {list(shape)}: {reason}")
        return row
    return next(row for row in rows if row.refuses(format, shape, compute) is None)


def refusals(
    format: Format, shape: tuple[int, ...], device: str, compute: str = "auto"
) -> list[tuple[str, str | None]]:
    """Each row of a device with the reason why it would not take a weight, or None."""
    return [(row.name, row.refuses(format, shape, compute)) for row in rows_for(device)]
