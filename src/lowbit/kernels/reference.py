"""The reference kernel: unpack, then multiply in torch. Every format, every device, the truth that other rows are tested against.

`compute` sets the precision of the product: "auto" is that of the activations. Formats that quantise activations
(w8a8) round each row of x to int8 with one scale, which is what an integer kernel computes:  y = (round(x / s) s) W^T,
s = max|x| / 127.
"""

from __future__ import annotations

import torch

from lowbit.formats import Format
from lowbit.grid import unpack
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
    weight = unpack(restore(buffers, format, shape))
    if format.act_bits == 8 or compute == "int8":
        return torch.nn.functional.linear(round_activations(x.float()), weight).to(x.dtype)
    dtype = _DTYPES.get(compute, x.dtype)
    return torch.nn.functional.linear(x.to(dtype), weight.to(dtype)).to(x.dtype)


def round_activations(x: torch.Tensor) -> torch.Tensor:
    """x as int8 with one scale per row would hold it, in fp32."""
    scale = x.abs().amax(dim=-1, keepdim=True).clamp_min(1e-12) / 127
    return (x / scale).round() * scale
