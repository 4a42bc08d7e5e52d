"""GGUF's Q4_1 and Q5_1, written and read byte for byte, in torch: 32 weights with a scale and a minimum of their own.

    w = d * q + m        d, m fp16; q of 4 or 5 bits

    q4_1   d, m, 16 bytes of nibbles                           byte i holds weight i low and weight i + 16 high
    q5_1   d, m, 32 fifth bits, 16 bytes of nibbles            bit i of the first is the fifth bit of weight i

weight [.., out, in] -> codes uint8 [.., out, ceil(in / 32) * block bytes]; the end of a row is padded with zeros. A
minimum that need not be a whole number of steps is what sets them apart from int4_asym_g32.
"""

from __future__ import annotations

import torch

from lowbit.formats import SMALL_BLOCKS, Format
from lowbit.packing import PackedTensor

_WEIGHTS = 32
_HALF = _WEIGHTS // 2
_NUMBERS = 4  # bytes of d and m


def quantize_small(weight: torch.Tensor, format: Format, steps: int, importance: torch.Tensor | None) -> PackedTensor:
    """Pack a weight [.., out, in].

    `steps` refits of d and m by least squares to the codes they give (0: plain rounding between the extremes), each kept
    where the squared error, weighed by `importance` [in], falls.
    """
    shape = tuple(weight.shape)
    mask = torch.ones(1, device=weight.device) if importance is None else importance.float()
    x, weights = (_blocks(part.float()) for part in (weight.detach(), mask.expand(shape)))
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    best = _rounded(x, weights, format, (high - low) / format.max_code, low)
    for _ in range(min(steps, 4)):  # the fifth refit moves nothing
        q = best[2]
        total, mean_q, mean_x = (v.sum(-1, keepdim=True) for v in (weights, weights * q, weights * x))
        sum_qq, sum_qx = (weights * q * q).sum(-1, keepdim=True), (weights * q * x).sum(-1, keepdim=True)
        determinant = total * sum_qq - mean_q * mean_q
        usable = determinant > 1e-6 * total * sum_qq
        d = torch.where(usable, (total * sum_qx - mean_x * mean_q) / determinant, best[0])
        m = torch.where(usable, (sum_qq * mean_x - mean_q * sum_qx) / determinant, best[1])
        tried = _rounded(x, weights, format, d, m)
        better = tried[3] < best[3]
        best = tuple(torch.where(better, new, old) for new, old in zip(tried, best, strict=True))
    return PackedTensor(
        format, shape, write_small(best[0], best[1], best[2].to(torch.uint8), format).reshape(*shape[:-1], -1)
    )


def dequantize_small(packed: PackedTensor) -> torch.Tensor:
    """The weight in fp32; equal bit for bit to what GGUF's own reader gives."""
    d, m, codes = read_small(packed.codes.reshape(-1, SMALL_BLOCKS[packed.format.name].bytes), packed.format)
    weight: torch.Tensor = d * codes.float() + m
    return weight.reshape(*packed.shape[:-1], -1)[..., : packed.shape[-1]]


def read_small(data: torch.Tensor, format: Format) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The inverse of `write_small`: d and m fp32 [n, 1], codes uint8 [n, 32] of blocks [n, bytes]."""
    numbers = data[:, :_NUMBERS].contiguous().view(torch.float16).float()
    nibbles = data[:, -_HALF:]
    codes = torch.cat([nibbles & 15, nibbles >> 4], dim=-1)
    if format.bits == 5:
        places = torch.arange(8, dtype=torch.uint8, device=data.device)
        codes = codes | (data[:, _NUMBERS:-_HALF, None] >> places & 1).flatten(1) << 4
    return numbers[:, :1], numbers[:, 1:], codes


def _blocks(rows: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(rows, (0, -rows.shape[-1] % _WEIGHTS)).reshape(-1, _WEIGHTS)


def _rounded(
    x: torch.Tensor, weights: torch.Tensor, format: Format, d: torch.Tensor, m: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """d and m as fp16 holds them, the nearest codes, and the error of each block."""
    d, m = (value.clamp(-65504.0, 65504.0).to(torch.float16).float() for value in (d, m))
    inverse = torch.where(d == 0, torch.zeros_like(d), 1 / d)
    q = ((x - m) * inverse).round().clamp(0, format.max_code)
    return d, m, q, (weights * (d * q + m - x).square()).sum(-1, keepdim=True)


def write_small(d: torch.Tensor, m: torch.Tensor, codes: torch.Tensor, format: Format) -> torch.Tensor:
    """Blocks [n, bytes] of d and m [n, 1] and codes [n, 32]."""
    parts = [torch.cat([d, m], dim=-1).to(torch.float16).view(torch.uint8)]
    if format.bits == 5:
        places = torch.arange(8, dtype=torch.uint8, device=codes.device)
        parts.append(((codes >> 4).view(len(codes), -1, 8) << places).sum(-1, dtype=torch.uint8))
    parts.append(codes[:, :_HALF] & 15 | (codes[:, _HALF:] & 15) << 4)
    return torch.cat(parts, dim=-1)
