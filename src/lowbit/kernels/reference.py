"""The reference kernel: unpack, then multiply in torch. Every format, every device, the truth that other rows are tested against.

`compute` sets the precision of the product: "auto" is that of the activations. Formats that quantise activations
(w8a8) round each row of x to int8 with one scale, which is what an integer kernel computes:  y = (round(x / s) s) W^T,
s = max|x| / 127. Where a layer has a fixed range (w8a8_static), x is rounded to its 256 steps instead, and cut at its ends:

    s = (high - low) / 255        z = round(-low / s)        x^ = s (clamp(round(x / s) + z, 0, 255) - z)
"""

from __future__ import annotations

from itertools import pairwise

import torch

from lowbit.formats import Format
from lowbit.grid import effective_scales, unpack
from lowbit.packing import PackedTensor

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def refuses(format: Format, shape: tuple[int, ...], compute: str) -> str | None:
    return None


def prepare(packed: PackedTensor) -> dict[str, torch.Tensor]:
    return packed.tensors()


def restore(buffers: dict[str, torch.Tensor], format: Format, shape: tuple[int, ...]) -> PackedTensor:
    return PackedTensor(format, shape, **buffers)


def run(
    x: torch.Tensor, buffers: dict[str, torch.Tensor], format: Format, shape: tuple[int, ...], compute: str
) -> torch.Tensor:
    """x [.., in] times a packed weight [out, in]: [.., out] in the type of x."""
    packed = restore(buffers, format, shape)
    weight = unpack(packed)
    if packed.input_range is not None:
        return torch.nn.functional.linear(round_to_range(x.float(), packed.input_range), weight).to(x.dtype)
    if format.act_bits == 8 or compute == "int8":
        return torch.nn.functional.linear(round_activations(x.float()), weight).to(x.dtype)
    dtype = _DTYPES.get(compute, x.dtype)
    return torch.nn.functional.linear(x.to(dtype), weight.to(dtype)).to(x.dtype)


def round_activations(x: torch.Tensor) -> torch.Tensor:
    """x as int8 with one scale per row would hold it, in fp32."""
    scale = x.abs().amax(dim=-1, keepdim=True).clamp_min(1e-12) / 127
    return (x / scale).round() * scale


def round_to_range(x: torch.Tensor, input_range: torch.Tensor) -> torch.Tensor:
    """x as 8-bit codes of a range [low, high] would hold it, in fp32. Zero is always among them."""
    step, zero = range_grid(input_range)
    return (((x.float() / step).round() + zero).clamp(0, 255) - zero) * step


def range_grid(input_range: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The step of a range's codes, and the code of zero."""
    low, high = input_range[0].clamp_max(0), input_range[1].clamp_min(0)
    step = ((high - low) / 255).clamp_min(1e-12)
    return step, (-low / step).round()


def expert(
    buffers: dict[str, torch.Tensor], format: Format, shape: tuple[int, ...], index: int
) -> dict[str, torch.Tensor]:
    """The buffers of one matrix of a 3-D weight, sharing memory."""
    return restore(buffers, format, shape).expert(index).tensors()


def run_experts(
    x: torch.Tensor,
    buffers: dict[str, torch.Tensor],
    format: Format,
    shape: tuple[int, ...],
    begins: torch.Tensor,
    compute: str,
) -> torch.Tensor:
    """Rows sorted by expert, [rows, in], times the expert that each was routed to: rows begins[e] to begins[e + 1] are
    those of expert e, and rows of none become zeros."""
    y = x.new_zeros(len(x), shape[-2])
    edges = begins.tolist()
    for index, (begin, end) in enumerate(pairwise(edges)):
        if begin < end:
            y[begin:end] = run(x[begin:end], expert(buffers, format, shape, index), format, shape[1:], compute)
    return y


def rows(buffers: dict[str, torch.Tensor], format: Format, shape: tuple[int, ...], ids: torch.Tensor) -> torch.Tensor:
    """Rows of a weight [out, in] in fp32."""
    return unpack(gather_rows(restore(buffers, format, shape), ids))


def gather_rows(packed: PackedTensor, ids: torch.Tensor) -> PackedTensor:
    """Some rows of a packed weight [out, in] as a packed weight of their own."""
    parts, format = packed.tensors(), packed.format
    if format.scale_block:
        # Blocks of doubly quantised scales cross rows, so the gathered rows carry plain fp32 scales.
        format = format.replace(scale_block=0, scale_dtype="float32")
        parts = {name: part for name, part in parts.items() if name not in ("scale_scales", "scale_offset")}
        parts["scales"] = effective_scales(packed)
    for name in ("codes", "scales", "zeros"):
        if parts.get(name) is not None and (name == "codes" or format.group_size != 0):
            parts[name] = parts[name][ids]
    return PackedTensor(format, (len(ids), packed.shape[-1]), **parts)
