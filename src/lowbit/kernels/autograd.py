"""The custom ops, for torch.compile and gradients: y = x W^T over a packed weight, the same by expert, and rows looked up.

    forward   y  = x W^T           by the layer's kernel
    backward  dx = dy W            W unpacked for the moment of the product, one expert at a time; the packed weight is frozen

torch.compile sees one opaque node per layer with a known output shape, whatever kernel is behind it. Outside of
compilation and of gradients the kernel is called directly: the dispatcher costs more than a small product.
"""

from __future__ import annotations

from itertools import pairwise

import torch

from lowbit.formats import Format, format_from_name
from lowbit.grid import unpack
from lowbit.kernels.table import Kernel, kernel_named


@torch.library.custom_op("lowbit::linear", mutates_args=())
def linear(
    x: torch.Tensor, buffers: list[torch.Tensor], names: str, kernel: str, format: str, shape: list[int], compute: str
) -> torch.Tensor:
    """x times a packed weight; `names` are the comma-separated names of the buffers."""
    named = dict(zip(names.split(","), buffers, strict=True))
    return kernel_named(kernel).run(x, named, format_from_name(format), tuple(shape), compute)


@linear.register_fake
def _(
    x: torch.Tensor, buffers: list[torch.Tensor], names: str, kernel: str, format: str, shape: list[int], compute: str
) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], shape[-2])


@torch.library.custom_op("lowbit::linear_input_gradient", mutates_args=())
def linear_input_gradient(
    grad: torch.Tensor, buffers: list[torch.Tensor], names: str, kernel: str, format: str, shape: list[int]
) -> torch.Tensor:
    """dy times the weight itself: the gradient with respect to x."""
    named = dict(zip(names.split(","), buffers, strict=True))
    weight = unpack(kernel_named(kernel).restore(named, format_from_name(format), tuple(shape)), grad.dtype)
    return grad @ weight


@linear_input_gradient.register_fake
def _(
    grad: torch.Tensor, buffers: list[torch.Tensor], names: str, kernel: str, format: str, shape: list[int]
) -> torch.Tensor:
    return grad.new_empty(*grad.shape[:-1], shape[-1])


def _setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[object, ...], output: torch.Tensor) -> None:
    ctx.packed = inputs[1:6]  # type: ignore[attr-defined]


def _backward(ctx: torch.autograd.function.FunctionCtx, grad: torch.Tensor) -> tuple[object, ...]:
    packed = ctx.packed  # type: ignore[attr-defined]
    dx = linear_input_gradient(grad, *packed)
    return (dx, [None] * len(packed[0]), None, None, None, None, None)


linear.register_autograd(_backward, setup_context=_setup_context)


def is_recorded() -> bool:
    """Whether somebody writes down what is computed: a call that no operation of torch stands for would be lost."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]


def multiply(
    x: torch.Tensor, buffers: dict[str, torch.Tensor], kernel: Kernel, format: str, shape: tuple[int, ...], compute: str
) -> torch.Tensor:
    """x times a packed weight, through the op where compilation or gradients need it and directly where they do not."""
    if is_recorded() or (x.requires_grad and torch.is_grad_enabled()):
        names = ",".join(buffers)
        y: torch.Tensor = linear(x, list(buffers.values()), names, kernel.name, format, list(shape), compute)
        return y
    return kernel.run(x, buffers, format_from_name(format), shape, compute)


@torch.library.custom_op("lowbit::experts", mutates_args=())
def experts(
    x: torch.Tensor,
    begins: torch.Tensor,
    buffers: list[torch.Tensor],
    names: str,
    kernel: str,
    format: str,
    shape: list[int],
    compute: str,
) -> torch.Tensor:
    """Rows sorted by expert times the packed weight of each expert; rows begins[e] to begins[e + 1] are those of e."""
    named = dict(zip(names.split(","), buffers, strict=True))
    return kernel_named(kernel).run_experts(x, named, format_from_name(format), tuple(shape), begins, compute)


@experts.register_fake
def _(
    x: torch.Tensor,
    begins: torch.Tensor,
    buffers: list[torch.Tensor],
    names: str,
    kernel: str,
    format: str,
    shape: list[int],
    compute: str,
) -> torch.Tensor:
    return x.new_empty(x.shape[0], shape[-2])


@torch.library.custom_op("lowbit::experts_input_gradient", mutates_args=())
def experts_input_gradient(
    grad: torch.Tensor,
    begins: torch.Tensor,
    buffers: list[torch.Tensor],
    names: str,
    kernel: str,
    format: str,
    shape: list[int],
) -> torch.Tensor:
    """The gradient with respect to the rows: zero for those that no expert took."""
    named, row, kind = dict(zip(names.split(","), buffers, strict=True)), kernel_named(kernel), format_from_name(format)
    dx = grad.new_zeros(len(grad), shape[-1])
    edges = begins.tolist()
    for index, (begin, end) in enumerate(pairwise(edges)):
        if begin < end:
            one = row.expert(named, kind, tuple(shape), index)
            dx[begin:end] = grad[begin:end] @ unpack(row.restore(one, kind, tuple(shape[1:])), grad.dtype)
    return dx


@experts_input_gradient.register_fake
def _(
    grad: torch.Tensor,
    begins: torch.Tensor,
    buffers: list[torch.Tensor],
    names: str,
    kernel: str,
    format: str,
    shape: list[int],
) -> torch.Tensor:
    return grad.new_empty(grad.shape[0], shape[-1])


def _setup_experts(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[object, ...], output: torch.Tensor) -> None:
    ctx.packed = inputs[1:7]  # type: ignore[attr-defined]


def _experts_backward(ctx: torch.autograd.function.FunctionCtx, grad: torch.Tensor) -> tuple[object, ...]:
    packed = ctx.packed  # type: ignore[attr-defined]
    dx = experts_input_gradient(grad, *packed)
    return (dx, None, [None] * len(packed[1]), None, None, None, None, None)


experts.register_autograd(_experts_backward, setup_context=_setup_experts)


def multiply_experts(
    x: torch.Tensor,
    begins: torch.Tensor,
    buffers: dict[str, torch.Tensor],
    kernel: Kernel,
    format: str,
    shape: tuple[int, ...],
    compute: str,
) -> torch.Tensor:
    """Rows sorted by expert times their experts, through the op where compilation or gradients need it."""
    if is_recorded() or (x.requires_grad and torch.is_grad_enabled()):
        names = ",".join(buffers)
        y: torch.Tensor = experts(x, begins, list(buffers.values()), names, kernel.name, format, list(shape), compute)
        return y
    return kernel.run_experts(x, buffers, format_from_name(format), shape, begins, compute)


@torch.library.custom_op("lowbit::rows", mutates_args=())
def rows(
    ids: torch.Tensor, buffers: list[torch.Tensor], names: str, kernel: str, format: str, shape: list[int]
) -> torch.Tensor:
    """Rows of a packed weight [out, in], numbered by `ids`, in fp32."""
    named = dict(zip(names.split(","), buffers, strict=True))
    return kernel_named(kernel).rows(named, format_from_name(format), tuple(shape), ids)


@rows.register_fake
def _(
    ids: torch.Tensor, buffers: list[torch.Tensor], names: str, kernel: str, format: str, shape: list[int]
) -> torch.Tensor:
    return buffers[0].new_empty(ids.shape[0], shape[-1], dtype=torch.float32)


def look_up(
    ids: torch.Tensor, buffers: dict[str, torch.Tensor], kernel: Kernel, format: Format, shape: tuple[int, ...]
) -> torch.Tensor:
    """Rows of a packed weight in fp32, through the op where compilation needs it."""
    if is_recorded():
        found: torch.Tensor = rows(
            ids, list(buffers.values()), ",".join(buffers), kernel.name, format.name, list(shape)
        )
        return found
    return kernel.rows(buffers, format, shape, ids)
