"""Between codes, one per byte, and the canonical dense bit stream, in torch.

Element i of a row occupies bits [i*bits, (i+1)*bits) of the row's little-endian stream of 32-bit words. Whatever the
width, 32 elements fill exactly `bits` words, so the shifts form a table of 32 rows; an element that crosses a word
adds to two of them:

    word[k]     |= code << offset          k, offset = divmod(i * bits, 32)
    word[k + 1] |= code >> (32 - offset)   when offset + bits > 32
"""

from __future__ import annotations

import torch

from lowbit.formats import Format

_PERIOD = 32
# Codes that are packed at once: on their way they take eight bytes each, sixteen times what they end in at 4 bits.
_AT_ONCE = 1 << 20


def pack_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 codes [.., n] to int32 words [.., ceil(n * bits / 32)]."""
    rows = codes.reshape(-1, codes.shape[-1])
    words = torch.empty(len(rows), -(-rows.shape[-1] * bits // 32), dtype=torch.int32, device=codes.device)
    step = max(_AT_ONCE // max(rows.shape[-1], 1), 1)
    for start in range(0, len(rows), step):
        words[start : start + step] = _pack_rows(rows[start : start + step], bits)
    return words.reshape(*codes.shape[:-1], -1)


def _pack_rows(codes: torch.Tensor, bits: int) -> torch.Tensor:
    count = codes.shape[-1]
    padded = torch.nn.functional.pad(codes, (0, -count % _PERIOD))
    lanes = padded.reshape(*padded.shape[:-1], -1, _PERIOD).to(torch.int64)
    words = torch.zeros(*lanes.shape[:-1], bits, dtype=torch.int64, device=codes.device)
    for i in range(_PERIOD):
        word, offset = divmod(i * bits, 32)
        words[..., word] |= lanes[..., i] << offset
        if offset + bits > 32:
            words[..., word + 1] |= lanes[..., i] >> (32 - offset)
    stream = words.flatten(-2)[..., : -(-count * bits // 32)] & 0xFFFFFFFF
    # int64 holds the unsigned word; fold the upper half onto the negative int32 range.
    return torch.where(stream >= 1 << 31, stream - (1 << 32), stream).to(torch.int32)


def unpack_codes(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """int32 words [.., W] to uint8 codes [.., count]."""
    padded = torch.nn.functional.pad(words, (0, -words.shape[-1] % bits))
    lanes = padded.reshape(*padded.shape[:-1], -1, bits).to(torch.int64) & 0xFFFFFFFF
    codes = torch.empty(*lanes.shape[:-1], _PERIOD, dtype=torch.uint8, device=words.device)
    for i in range(_PERIOD):
        word, offset = divmod(i * bits, 32)
        value = lanes[..., word] >> offset
        if offset + bits > 32:
            value = value | lanes[..., word + 1] << (32 - offset)
        codes[..., i] = (value & ((1 << bits) - 1)).to(torch.uint8)
    return codes.flatten(-2)[..., :count]


def spread_groups(values: torch.Tensor, format: Format, in_features: int) -> torch.Tensor:
    """Scales or zero points [.., G] laid out beside their weights: [.., in_features] (or broadcastable to it)."""
    if format.group_size <= 0 or values.shape[-1] == 1:
        return values
    return values.repeat_interleave(format.group_size, dim=-1)[..., :in_features]
