"""Linears as GPTQ and AWQ write them, packed here number by number, so that readers are held against something of another hand."""

from __future__ import annotations

import torch

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def round_groups(
    weight: torch.Tensor, bits: int, group_of: torch.Tensor, symmetric: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A weight [out, in] to nearest: codes [out, in], scales fp16 [G, out], zeros [G, out], and the weight that they mean."""
    groups, top = int(group_of.max()) + 1, (1 << bits) - 1
    scales, zeros = torch.empty(groups, len(weight)), torch.empty(groups, len(weight))
    for group in range(groups):
        part = weight[:, group_of == group]
        low, high = part.amin(1).clamp_max(0), part.amax(1).clamp_min(0)
        if symmetric:
            scales[group] = torch.maximum(-low, high) / (top // 2)
            zeros[group] = 1 << (bits - 1)
        else:
            scales[group] = (high - low) / top
            zeros[group] = (-low / scales[group].half().float()).round().clamp(0, top)
    scales = scales.half()
    wide_scales, wide_zeros = scales.float()[group_of].t(), zeros[group_of].t()
    codes = ((weight / wide_scales).round() + wide_zeros).clamp(0, top)
    return codes.int(), scales, zeros.int(), wide_scales * (codes - wide_zeros)


def dense_words(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Columns [n, m] as dense streams of int32 words [n * bits / 32, m], least significant bit first."""
    rows, columns = values.shape
    words = torch.zeros(rows * bits // 32, columns, dtype=torch.int32)
    for column in range(columns):
        stream = sum(int(v) << (i * bits) for i, v in enumerate(values[:, column].tolist()))
        for i in range(len(words)):
            word = (stream >> (32 * i)) & 0xFFFFFFFF
            words[i, column] = word - (1 << 32) if word >= 1 << 31 else word
    return words


def gptq_linear(
    weight: torch.Tensor,
    bits: int = 4,
    group: int = 32,
    act_order: bool = False,
    symmetric: bool = False,
    shift: int = 1,
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """GPTQ's tensors of a weight [out, in], and the weight that they mean."""
    inputs = weight.shape[1]
    group_of = torch.arange(inputs) // group
    if act_order:
        group_of = group_of[torch.randperm(inputs, generator=torch.Generator().manual_seed(0))]
    codes, scales, zeros, meant = round_groups(weight, bits, group_of, symmetric)
    stored = (zeros - shift) & ((1 << bits) - 1)
    tensors = {"qweight": dense_words(codes.t(), bits), "scales": scales, "qzeros": dense_words(stored.t(), bits).t()}
    return tensors | {"g_idx": group_of.int()}, meant


def awq_linear(weight: torch.Tensor, group: int = 32) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """AWQ's tensors of a weight [out, in] in the layout gemm, and the weight that they mean."""
    codes, scales, zeros, meant = round_groups(weight, 4, torch.arange(weight.shape[1]) // group)
    return {"qweight": awq_words(codes.t()), "scales": scales, "qzeros": awq_words(zeros)}, meant


def awq_words(values: torch.Tensor) -> torch.Tensor:
    """[n, out] as words [n, out / 8]."""
    words = torch.zeros(len(values), values.shape[1] // 8, dtype=torch.int64)
    for nibble, output in enumerate(AWQ_ORDER):
        words |= values[:, output::8].long() << (4 * nibble)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int()
