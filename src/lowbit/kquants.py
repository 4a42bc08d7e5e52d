"""k-quants: GGUF's super-blocks of 256 weights, written and read byte for byte, in torch.

A super-block is cut into 8 or 16 sub-blocks, whose small integer scales (and minima) share one or two fp16 factors:

    q2_k q4_k q5_k   w = (d * scale) * q - (dmin * minimum)      q, scale, minimum >= 0
    q3_k q6_k        w = (d * scale) * (q - midpoint)            scale signed

    weight [.., out, in] -> codes uint8 [.., out, ceil(in / 256) * block bytes]; the end of a row is padded with zeros

Where each number stands in a block is a row of `LAYOUTS`, which `read_blocks` and `write_blocks` interpret. Choosing
the numbers is a descent on sum(m (w - w^)^2), m an importance per input; steps are judged by what will be read back:

    1. each sub-block alone: real scale and minimum, candidates refitted by least squares to the codes they give
    2. the block: fp16 factors that just reach the largest scale and minimum, the others rounded to integers under them
    3. integers one up or down, factors refitted by least squares, codes rounded anew: kept where the error falls

so rounding the scales costs little: the codes and the other numbers move to make up for it. All blocks of a slice of
rows are worked on at once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from lowbit.formats import Format
from lowbit.packing import PackedTensor
from lowbit.small_blocks import dequantize_small, quantize_small

_WEIGHTS = 256
# Blocks worked on together: a megabyte for each working copy in fp32.
_SLICE_BLOCKS = 1024
_SMALLEST_HALF = 2.0**-24
_LARGEST_HALF = 65504.0
# Rounds two and three lower the error by 0.3 and 0.1 %, a fourth by less than 0.05 %.
_REFINE_ROUNDS = 3


@dataclass(frozen=True)
class Piece:
    """Some bytes of a block: fields `bits` wide of one quantity, which stand at bit `shift` of its values.

    `run` consecutive values take one field of `run` consecutive bytes; the next run takes their next field.
    """

    quantity: str
    size: int
    bits: int
    run: int = 1
    shift: int = 0


@dataclass(frozen=True)
class Layout:
    """What a block holds: the range of each integer, and the pieces in the order of their bytes."""

    bits: int
    sub_blocks: int
    scale_low: int
    scale_high: int
    minimum_high: int
    scale_bias: int
    pieces: tuple[Piece, ...]

    @property
    def midpoint(self) -> int:
        return 0 if self.minimum_high else 1 << (self.bits - 1)

    @property
    def max_code(self) -> int:
        return (1 << self.bits) - 1


_D, _DMIN = Piece("d", 2, 16), Piece("dmin", 2, 16)
# Eight scales, then eight minima, of six bits each, in twelve bytes.
_SIX_BIT = Piece("scales", 12, 6)
_LOW_NIBBLES = Piece("codes", 128, 4, run=32)
_LOW_PAIRS = Piece("codes", 64, 2, run=32)

LAYOUTS: dict[str, Layout] = {
    "q2_k": Layout(2, 16, 0, 15, 15, 0, (Piece("scales", 16, 4, run=16), _LOW_PAIRS, _D, _DMIN)),
    "q3_k": Layout(3, 16, -32, 31, 0, 32, (
        Piece("codes", 32, 1, run=32, shift=2), _LOW_PAIRS,
        Piece("scales", 8, 4, run=8), Piece("scales", 4, 2, run=4, shift=4), _D,
    )),
    "q4_k": Layout(4, 8, 0, 63, 63, 0, (_D, _DMIN, _SIX_BIT, _LOW_NIBBLES)),
    "q5_k": Layout(5, 8, 0, 63, 63, 0, (_D, _DMIN, _SIX_BIT, Piece("codes", 32, 1, run=32, shift=4), _LOW_NIBBLES)),
    "q6_k": Layout(6, 16, -128, 127, 0, 0, (
        Piece("codes", 128, 4, run=64), Piece("codes", 64, 2, run=32, shift=4), Piece("scales", 16, 8), _D,
    )),
}  # fmt: skip


@dataclass(frozen=True)
class Blocks:
    """The numbers of B blocks of S sub-blocks: factors fp32 [B, 1], integers [B, S], codes uint8 [B, 256].

    While fitting, integers and codes are whole numbers in fp32, and `error` [B, S] is the weighted squared error.
    """

    d: torch.Tensor
    dmin: torch.Tensor
    scales: torch.Tensor
    minima: torch.Tensor
    codes: torch.Tensor
    error: torch.Tensor | None = None


def quantize_kquant(
    weight: torch.Tensor, format: Format, steps: int = 0, importance: torch.Tensor | None = None
) -> PackedTensor:
    """Pack a weight [.., out, in].

    `steps` candidates are tried per sub-block (0: plain rounding); `importance` [in] weighs the error of each input.
    """
    if format.name not in LAYOUTS:
        return quantize_small(weight, format, steps, importance)
    layout = LAYOUTS[format.name]
    in_features = weight.shape[-1]
    rows = weight.detach().reshape(-1, in_features)
    mask = torch.ones(1, device=weight.device) if importance is None else importance.float()
    masks = mask.expand(weight.shape).reshape(rows.shape)
    step = max(_SLICE_BLOCKS * _WEIGHTS // in_features, 1)
    parts = []
    for start in range(0, len(rows), step):
        x, m = (_sub_blocks(part[start : start + step].float(), layout) for part in (rows, masks))
        parts.append(write_blocks(_fit_blocks(x, m, layout, steps), layout))
    codes = torch.cat(parts).reshape(*weight.shape[:-1], -1)
    return PackedTensor(format, tuple(weight.shape), codes)


def _sub_blocks(rows: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Rows [r, in] as [B, S, n], the end of each row padded with zeros: weights that do not count in the error."""
    padded = torch.nn.functional.pad(rows, (0, -rows.shape[-1] % _WEIGHTS))
    return padded.reshape(-1, layout.sub_blocks, _WEIGHTS // layout.sub_blocks)


def dequantize_kquant(packed: PackedTensor) -> torch.Tensor:
    """The weight in fp32 that a PackedTensor stands for; equal bit for bit to what GGUF's own reader gives."""
    if packed.format.name not in LAYOUTS:
        return dequantize_small(packed)
    layout = LAYOUTS[packed.format.name]
    size = sum(piece.size for piece in layout.pieces)
    blocks = read_blocks(packed.codes.reshape(-1, size), layout)
    values = blocks.codes.view(-1, layout.sub_blocks, _WEIGHTS // layout.sub_blocks).float() - layout.midpoint
    # Products in this order, each rounded to fp32: another order differs in the last bit.
    weight = (blocks.d * blocks.scales).unsqueeze(-1) * values
    if layout.minimum_high:
        weight = weight - (blocks.dmin * blocks.minima).unsqueeze(-1)
    return weight.reshape(*packed.shape[:-1], -1)[..., : packed.shape[-1]]


# Bytes


def read_blocks(data: torch.Tensor, layout: Layout) -> Blocks:
    """uint8 [B, block bytes] to the numbers that the blocks hold."""
    count, integers = layout.sub_blocks, 2 * layout.sub_blocks if layout.minimum_high else layout.sub_blocks
    values = {
        "codes": torch.zeros(len(data), _WEIGHTS, dtype=torch.uint8, device=data.device),
        "scales": torch.zeros(len(data), integers, dtype=torch.uint8, device=data.device),
    }
    halves = {"dmin": torch.zeros(len(data), 1, device=data.device)}
    start = 0
    for piece in layout.pieces:
        part = data[:, start : start + piece.size]
        start += piece.size
        if piece.bits == 16:
            halves[piece.quantity] = part.contiguous().view(torch.float16).float()
        elif piece.bits == 6:
            values[piece.quantity] = _split_six_bits(part)
        else:
            values[piece.quantity] |= split_fields(part, piece.bits, piece.run) << piece.shift
    scales = values["scales"].view(torch.int8).float()
    return Blocks(
        halves["d"], halves["dmin"], scales[:, :count] - layout.scale_bias, scales[:, count:], values["codes"]
    )


def write_blocks(blocks: Blocks, layout: Layout) -> torch.Tensor:
    """The inverse of `read_blocks`."""
    scales = (blocks.scales + layout.scale_bias).to(torch.int8).view(torch.uint8)
    if layout.minimum_high:
        scales = torch.cat([scales, blocks.minima.to(torch.uint8)], dim=-1)
    values = {"codes": blocks.codes.to(torch.uint8), "scales": scales}
    halves = {"d": blocks.d, "dmin": blocks.dmin}
    parts = []
    for piece in layout.pieces:
        if piece.bits == 16:
            parts.append(halves[piece.quantity].to(torch.float16).view(torch.uint8))
        elif piece.bits == 6:
            parts.append(_join_six_bits(values[piece.quantity]))
        else:
            field = values[piece.quantity] >> piece.shift & ((1 << piece.bits) - 1)
            parts.append(join_fields(field, piece.bits, piece.run))
    return torch.cat(parts, dim=-1)


def split_fields(data: torch.Tensor, bits: int, run: int) -> torch.Tensor:
    """Bytes [B, n] to fields [B, n * 8 / bits]: the lowest field of `run` bytes, then their next field, and so on."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=data.device)[:, None]
    fields = data.reshape(len(data), -1, 1, run) >> shifts & ((1 << bits) - 1)
    return fields.flatten(1)


def join_fields(fields: torch.Tensor, bits: int, run: int) -> torch.Tensor:
    """The inverse of `split_fields`."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=fields.device)[:, None]
    shifted = fields.reshape(len(fields), -1, 8 // bits, run) << shifts
    return shifted.sum(dim=2, dtype=torch.uint8).flatten(1)


def _split_six_bits(data: torch.Tensor) -> torch.Tensor:
    """12 bytes to 16 values, scales then minima.

    The first four of each lie in the low six bits of bytes 0 to 7; the other four keep four bits in bytes 8 to 11
    (scales low, minima high) and their top two bits above the first four.
    """
    first, nibbles = data[:, :8], data[:, 8:]
    top = first >> 6 << 4
    scales = (nibbles & 15) | top[:, :4]
    minima = (nibbles >> 4) | top[:, 4:]
    first = first & 63
    return torch.cat([first[:, :4], scales, first[:, 4:], minima], dim=-1)


def _join_six_bits(values: torch.Tensor) -> torch.Tensor:
    """The inverse of `_split_six_bits`."""
    scales, minima = values[:, 4:8], values[:, 12:]
    first = values[:, :4] | scales >> 4 << 6
    second = values[:, 8:12] | minima >> 4 << 6
    return torch.cat([first, second, (scales & 15) | (minima & 15) << 4], dim=-1)


# Numbers. x and m below are values and weights of the error, [B, S, n].


def _fit_blocks(x: torch.Tensor, m: torch.Tensor, layout: Layout, steps: int) -> Blocks:
    fit = _fit_offset if layout.minimum_high else _fit_signed
    scales, minima = fit(x, m, layout, steps)
    best = _round_factors(x, m, layout, scales, minima)
    for _ in range(_REFINE_ROUNDS if steps else 0):
        best = _nudge_integers(x, m, layout, best)
        best = _refit_factors(x, m, layout, best)
    return replace(best, codes=best.codes.flatten(1))


def _fit_offset(x: torch.Tensor, m: torch.Tensor, layout: Layout, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Real scale and minimum of each sub-block, w = scale * q - minimum, both >= 0: two of [B, S]."""
    low = x.amin(-1, keepdim=True).clamp_max(0.0)
    span = (x.amax(-1, keepdim=True) - low).clamp_min(1e-30)
    scale, offset = span / layout.max_code, low
    best = _squared_error(x, m, scale * ((x - low) / scale).round().clamp(0, layout.max_code) + low)
    total, mean = m.sum(-1, keepdim=True), (m * x).sum(-1, keepdim=True)
    for i in range(steps):
        # Up to one and a half codes more or fewer than there are for the span: more means that both ends are clipped.
        width = layout.max_code + 3.0 * (i / max(steps - 1, 1)) - 1.5
        q = ((x - low) * (width / span)).round().clamp(0, layout.max_code)
        mq = m * q
        sum_q, sum_qq, sum_qx = mq.sum(-1, keepdim=True), (mq * q).sum(-1, keepdim=True), (mq * x).sum(-1, keepdim=True)
        determinant = total * sum_qq - sum_q * sum_q
        slope = (total * sum_qx - mean * sum_q) / determinant
        floor = (sum_qq * mean - sum_q * sum_qx) / determinant
        # The minimum cannot be negative: where the line would start above zero, it goes through zero.
        slope = torch.where(floor > 0, sum_qx / sum_qq, slope)
        floor = floor.clamp_max(0.0)
        error = _squared_error(x, m, slope * q + floor)
        better = (error < best) & (determinant > 0) & (slope > 0)
        best = torch.where(better, error, best)
        scale, offset = torch.where(better, slope, scale), torch.where(better, floor, offset)
    return scale.squeeze(-1), -offset.squeeze(-1)


def _fit_signed(x: torch.Tensor, m: torch.Tensor, layout: Layout, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Real signed scale of each sub-block, w = scale * (q - midpoint), and no minimum: two of [B, S]."""
    extreme = x.gather(-1, x.abs().argmax(-1, keepdim=True))
    scale = extreme / -layout.midpoint
    best = torch.full_like(scale, torch.inf)
    for i in range(steps + 1):
        # The plain scale first, then from 0.7 of the codes in use to the extreme weight clipped by 0.3.
        width = layout.midpoint * (1.0 if i == 0 else 0.7 + 0.6 * i / steps)
        usable = torch.where(extreme == 0, torch.ones_like(extreme), extreme / -width)
        q = (x / usable).round().clamp(-layout.midpoint, layout.max_code - layout.midpoint)
        mq = m * q
        square = (mq * q).sum(-1, keepdim=True)
        refitted = torch.where(square > 0, (mq * x).sum(-1, keepdim=True) / square, scale) if i else scale
        error = _squared_error(x, m, refitted * q)
        better = error < best
        best, scale = torch.where(better, error, best), torch.where(better, refitted, scale)
    return scale.squeeze(-1), torch.zeros_like(scale).squeeze(-1)


def _squared_error(x: torch.Tensor, m: torch.Tensor, restored: torch.Tensor) -> torch.Tensor:
    return (m * (restored - x).square()).sum(-1, keepdim=True)


def _round_factors(
    x: torch.Tensor, m: torch.Tensor, layout: Layout, scales: torch.Tensor, minima: torch.Tensor
) -> Blocks:
    """Factors in fp16 for real scales and minima [B, S], and these as integers."""
    largest = scales.gather(-1, scales.abs().argmax(-1, keepdim=True))
    # A signed integer reaches one further down than up, so the largest scale takes the lowest.
    d = _to_half(largest / (layout.scale_low or layout.scale_high))
    dmin = _to_half(minima.amax(-1, keepdim=True) / max(layout.minimum_high, 1))
    return _with_codes(x, m, layout, (d, dmin, _whole(scales, d), _whole(minima, dmin)))


def _nudge_integers(x: torch.Tensor, m: torch.Tensor, layout: Layout, start: Blocks) -> Blocks:
    """Move each sub-block's integers by one where that lowers its error."""
    best = start
    for by in range(-1, 2):
        for minimum_by in range(-1, 2) if layout.minimum_high else (0,):
            if by or minimum_by:
                moved = (start.d, start.dmin, start.scales + by, start.minima + minimum_by)
                best = _better_sub_blocks(best, _with_codes(x, m, layout, moved))
    return best


def _refit_factors(x: torch.Tensor, m: torch.Tensor, layout: Layout, best: Blocks) -> Blocks:
    """Both factors of each block by least squares over its weights, the rest as it is; kept where the error falls."""
    a = best.scales.unsqueeze(-1) * (best.codes - layout.midpoint)
    c = best.minima.unsqueeze(-1).expand_as(a)
    sum_aa, sum_ac, sum_cc = ((m * p * q).sum((1, 2)).unsqueeze(-1) for p, q in ((a, a), (a, c), (c, c)))
    sum_ax, sum_cx = (m * a * x).sum((1, 2)).unsqueeze(-1), (m * c * x).sum((1, 2)).unsqueeze(-1)
    determinant = sum_aa * sum_cc - sum_ac * sum_ac
    joint = determinant > 1e-6 * sum_aa * sum_cc
    d = torch.where(joint, (sum_ax * sum_cc - sum_cx * sum_ac) / determinant, (sum_ax + best.dmin * sum_ac) / sum_aa)
    dmin = torch.where(joint, (sum_ax * sum_ac - sum_cx * sum_aa) / determinant, best.dmin)
    usable = torch.isfinite(d) & (dmin >= 0)
    d, dmin = _to_half(torch.where(usable, d, best.d)), _to_half(torch.where(usable, dmin, best.dmin))
    return _better_blocks(best, _with_codes(x, m, layout, (d, dmin, best.scales, best.minima)))


def _with_codes(x: torch.Tensor, m: torch.Tensor, layout: Layout, numbers: tuple[torch.Tensor, ...]) -> Blocks:
    """Codes nearest to the values under stored numbers (d, dmin, scales, minima), and the error of each sub-block."""
    d, dmin, scales, minima = numbers
    scales = scales.clamp(layout.scale_low, layout.scale_high)
    minima = minima.clamp(0, layout.minimum_high)
    step, offset = (d * scales).unsqueeze(-1), (dmin * minima).unsqueeze(-1)
    inverse = torch.where(step == 0, torch.zeros_like(step), 1 / step)
    q = ((x + offset) * inverse).round().clamp(-layout.midpoint, layout.max_code - layout.midpoint)
    error = _squared_error(x, m, step * q - offset).squeeze(-1)
    return Blocks(d, dmin, scales, minima, q + layout.midpoint, error)


def _to_half(factor: torch.Tensor) -> torch.Tensor:
    """A factor as fp16 will hold it; one too small becomes the smallest half, so that tiny weights keep some codes."""
    size = factor.abs().clamp(_SMALLEST_HALF, _LARGEST_HALF).to(torch.float16).float()
    return torch.where(factor == 0, factor, size.copysign(factor))


def _whole(values: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    return torch.where(factor == 0, torch.zeros_like(values), (values / factor).round())


def _better_blocks(a: Blocks, b: Blocks) -> Blocks:
    """Of each block the one with the lower error."""
    assert a.error is not None and b.error is not None
    return _choose(a, b, (b.error.sum(-1, keepdim=True) < a.error.sum(-1, keepdim=True)))


def _better_sub_blocks(a: Blocks, b: Blocks) -> Blocks:
    """Of each sub-block the one with the lower error; both share the factors."""
    assert a.error is not None and b.error is not None
    return _choose(replace(a, d=b.d, dmin=b.dmin), b, b.error < a.error)


def _choose(a: Blocks, b: Blocks, take: torch.Tensor) -> Blocks:
    whole = take[:, :1]
    assert a.error is not None and b.error is not None
    return Blocks(
        torch.where(whole, b.d, a.d),
        torch.where(whole, b.dmin, a.dmin),
        torch.where(take, b.scales, a.scales),
        torch.where(take, b.minima, a.minima),
        torch.where(take.unsqueeze(-1), b.codes, a.codes),
        torch.where(take, b.error, a.error),
    )
