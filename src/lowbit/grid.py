"""The one place where numbers are rounded: fit_grid finds scales, to_codes rounds, from_codes undoes it.

    fit_grid    weight groups -> scales (and zero points), rounded to the type they are stored in
    to_codes    q = clamp(round(w / s) + z, 0, 2^bits - 1)         codebooks: the nearest level of w / s
    from_codes  w^ = s * (q - z)                                   codebooks: s * levels[q]

Codes are always chosen against the scale *after* it was rounded for storage, so that |w - w^| <= |s| / 2 inside the
range. A fine zero point lies between codes, so z is added before rounding, q = clamp(round(w / s + z)), and 0 need not be
a point of the grid.

Symmetric integers use the full range: the scale carries a sign, chosen so that the weight of the largest magnitude
lands on -2^(bits-1) exactly (a restricted range wastes that code, which at 2 bits is a quarter of them).

`Search` refines the scale of each group: `grid_search.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lowbit.bits import pack_codes, spread_groups, unpack_codes
from lowbit.errors import WeightError
from lowbit.formats import SCALE_BITS, Format
from lowbit.grid_core import core_quantize, core_serves, core_unpack
from lowbit.grid_points import code_values, nearest_codes, round_zeros
from lowbit.grid_search import TINY_SCALE, Groups, extremes, search_scales
from lowbit.kquants import dequantize_kquant, quantize_kquant
from lowbit.packing import PackedTensor
from lowbit.search import PLAIN, Search, worth_searching

SCALE_TORCH_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_SUMMED_AT_ONCE = 1 << 22
_E8M0_BIAS = 127
# A code of a doubly quantised scale that means "the tensor's mean scale".
_DQ_MIDPOINT = 128


@dataclass(frozen=True)
class Grid:
    """The fitted grid of one weight: scales [.., G] in fp32 as they will be read back, zeros [.., G] in codes or None."""

    scales: torch.Tensor
    zeros: torch.Tensor | None
    stored: dict[str, torch.Tensor]


def quantize(
    weight: torch.Tensor, format: Format, search: Search = PLAIN, importance: torch.Tensor | None = None
) -> PackedTensor:
    """Round a weight [.., out, in] to a format of any kind; `importance` [in] weighs the squared error of each input."""
    if importance is not None:
        check_importance(importance, weight)
    search = _search_for(weight, format, search, importance)
    if format.kind == "kquant":
        return quantize_kquant(weight, format, search.steps, importance)
    packed = core_quantize(weight, format, search, importance)
    return packed if packed is not None else pack(weight, format, fit_grid(weight, format, search, importance))


def rounded(
    weight: torch.Tensor, format: Format, search: Search = PLAIN, importance: torch.Tensor | None = None
) -> torch.Tensor:
    """What `quantize` would be read back as, in fp32; where the definition rounds, no codes are packed for it."""
    if format.kind == "kquant" or core_serves(format, weight):
        return unpack(quantize(weight, format, search, importance))
    grid = fit_grid(weight, format, search, importance)
    return from_codes(to_codes(weight, format, grid.scales, grid.zeros), format, grid.scales, grid.zeros)


def fit(weight: torch.Tensor, format: Format, search: Search, importance: torch.Tensor) -> Grid:
    """The grid that `quantize` rounds a weight onto; the core finds it where it can."""
    packed = core_quantize(weight, format, search, importance)
    if packed is None:
        return fit_grid(weight, format, search, importance)
    stored = {name: tensor for name, tensor in packed.tensors().items() if name != "codes"}
    return Grid(effective_scales(packed), effective_zeros(packed), stored)


def fit_grid(
    weight: torch.Tensor, format: Format, search: Search = PLAIN, importance: torch.Tensor | None = None
) -> Grid:
    """Scales and zero points for a weight [.., out, in]; `importance` [in] weighs the squared error of each input."""
    search = _search_for(weight, format, search, importance)
    groups, mask = group_weight(weight, format)
    weights = groups.abs().sqrt() if search.refit else mask
    if importance is not None:
        weights = mask * group_weight(importance.float().expand_as(weight), format)[0]
    rounder = scale_rounder(weight, format)
    scales, zeros = _plain_scales(groups, format, rounder)
    if search.steps:
        scales, zeros = search_scales(Groups(groups, weights, format), rounder, search, (scales, zeros))
    return store_grid(tuple(weight.shape), groups, scales, zeros, rounder)


def _search_for(weight: torch.Tensor, format: Format, search: Search, importance: torch.Tensor | None) -> Search:
    if importance is not None or format.kind != "int":
        return search
    return worth_searching(search, format.bits, format.group_size if format.group_size > 0 else weight.shape[-1])


def store_grid(
    shape: tuple[int, ...],
    groups: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    rounder: ScaleRounder,
) -> Grid:
    """The grid of a weight of that shape: scales (and zero points) of its groups, [groups, 1], as they are stored."""
    format = rounder.format
    if format.scale_block:
        scales = _fill_blanks(scales, groups)
    places = (*shape[:-2], 1, 1) if format.group_size == 0 else (*shape[:-1], -1)
    zeros = None if zeros is None else zeros.reshape(places)
    return _stored_grid(scales.reshape(places), zeros, format, rounder.unit)


def to_codes(weight: torch.Tensor, format: Format, scales: torch.Tensor, zeros: torch.Tensor | None) -> torch.Tensor:
    """The codes (uint8, the shape of weight) nearest to a weight under fp32 scales."""
    step = spread_groups(scales, format, weight.shape[-1])
    zero = None if zeros is None else spread_groups(zeros, format, weight.shape[-1])
    return nearest_codes(weight.float(), step, zero, format).to(torch.uint8)


def from_codes(codes: torch.Tensor, format: Format, scales: torch.Tensor, zeros: torch.Tensor | None) -> torch.Tensor:
    """The weight in fp32 that codes stand for."""
    step = spread_groups(scales.float(), format, codes.shape[-1])
    zero = None if zeros is None else spread_groups(zeros.float(), format, codes.shape[-1])
    return step * code_values(codes, zero, format)


def pack(weight: torch.Tensor, format: Format, grid: Grid) -> PackedTensor:
    """Round a weight onto a fitted grid and store it."""
    codes = to_codes(weight, format, grid.scales, grid.zeros)
    return PackedTensor(format, tuple(weight.shape), pack_codes(codes, format.bits), **grid.stored)


def unpack(packed: PackedTensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The weight that a PackedTensor stands for. The inverse of `pack` up to rounding; bit-exact in fp32."""
    format = packed.format
    if format.kind == "kquant":
        return dequantize_kquant(packed).to(dtype)
    weight = core_unpack(packed, dtype)
    return weight if weight is not None else unpack_by_definition(packed).to(dtype)


def unpack_by_definition(packed: PackedTensor) -> torch.Tensor:
    """What `unpack` is defined as, in fp32, on any device."""
    format = packed.format
    codes = unpack_codes(packed.codes, format.bits, packed.shape[-1])
    weight = from_codes(codes, format, effective_scales(packed), effective_zeros(packed))
    if packed.order is not None:
        weight = torch.empty_like(weight).index_copy_(-1, packed.order.long(), weight)
    return weight


def effective_scales(packed: PackedTensor) -> torch.Tensor:
    """The scales of a weight in fp32, whatever they are stored as."""
    format, scales = packed.format, packed.scales
    assert isinstance(scales, torch.Tensor)
    if format.scale_dtype == "e8m0":
        return torch.exp2(scales.float() - _E8M0_BIAS)
    if format.scale_dtype == "e4m3":
        factor: torch.Tensor = packed.scale_scales
        return scales.view(torch.float8_e4m3fn).float() * factor
    if format.scale_block:
        block = torch.arange(scales.numel(), device=scales.device) // format.scale_block
        step: torch.Tensor = packed.scale_scales[block].view(scales.shape)
        offset: torch.Tensor = packed.scale_offset
        return (scales.float() - _DQ_MIDPOINT) * step + offset
    return scales.float()


def effective_zeros(packed: PackedTensor) -> torch.Tensor | None:
    """The zero points of a weight in codes, whatever they count."""
    zeros = packed.zeros
    if zeros is None:
        return None
    assert isinstance(zeros, torch.Tensor)
    return zeros.float() * packed.format.zero_step


def check_finite(weight: torch.Tensor, name: str) -> None:
    """Refuse a weight with NaN or infinite entries, saying where."""
    # The sum of finite values is finite unless it overflows, so one pass clears nearly every weight. It goes part by part, because
    # torch makes a float32 copy of what it sums: of the 1.1 B's embedding that would be 400 MB.
    row = weight[0].numel() if weight.dim() and len(weight) else 1
    parts = torch.split(weight, max(_SUMMED_AT_ONCE // max(row, 1), 1)) if weight.dim() else (weight,)
    if all(bool(torch.isfinite(part.sum(dtype=torch.float32))) for part in parts):
        return
    bad = (~torch.isfinite(weight)).nonzero()
    if len(bad):
        place = bad[0].tolist()
        raise WeightError(
            f"{name} holds {len(bad)} values that are NaN or infinite (the first at {place}); "
            "the model that it comes from is broken or its file is damaged: get it again"
        )


def check_importance(importance: torch.Tensor, weight: torch.Tensor) -> None:
    """Refuse an importance that is not one number for each input: the core reads it without looking at its length."""
    if tuple(importance.shape) != (weight.shape[-1],):
        raise WeightError(
            f"an importance of shape {list(importance.shape)} does not fit a weight {list(weight.shape)}: "
            f"it has one number for each of the {weight.shape[-1]} inputs"
        )


class ScaleRounder:
    """Rounds scales to the type they are stored in and gives back what will be read."""

    def __init__(self, format: Format, unit: torch.Tensor | None) -> None:
        self.format = format
        self.unit = unit

    def __call__(self, scales: torch.Tensor) -> torch.Tensor:
        if self.format.scale_dtype == "e8m0":
            # The nearest power of two, not the nearest exponent: it leaves the least error of those that can be stored.
            mantissa, exponent = torch.frexp(scales.abs().clamp_min(2.0**-_E8M0_BIAS))
            exponent = torch.where(mantissa >= 0.75, exponent, exponent - 1)
            return torch.exp2(exponent.clamp(-_E8M0_BIAS, _E8M0_BIAS).float())
        if self.unit is not None:
            return (scales / self.unit).clamp(2.0**-9, 448.0).to(torch.float8_e4m3fn).float() * self.unit
        dtype = SCALE_TORCH_DTYPES[self.format.scale_dtype]
        # A scale beyond the type would be stored as infinity, and its group read as NaN; clamped, the group saturates.
        largest = torch.finfo(dtype).max
        rounded = scales.clamp(-largest, largest).to(dtype).float()
        return torch.where(rounded.abs() < TINY_SCALE, torch.ones_like(rounded), rounded)


def scale_rounder(weight: torch.Tensor, format: Format) -> ScaleRounder:
    """What rounds the scales of a weight to the type of a format."""
    return ScaleRounder(format, _global_scale(weight, format))


def group_weight(weight: torch.Tensor, format: Format) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight as [groups, group_size] in fp32, zero-padded, and a mask of the entries that exist."""
    weight = weight.float()
    if format.group_size == 0:
        flat = weight.flatten(-2)
        flat = flat.reshape(-1, flat.shape[-1])
        return flat, torch.ones_like(flat)
    size = weight.shape[-1] if format.group_size < 0 else format.group_size
    short = -weight.shape[-1] % size
    groups = torch.nn.functional.pad(weight, (0, short)).reshape(-1, size)
    mask = torch.nn.functional.pad(torch.ones_like(weight), (0, short)).reshape(-1, size)
    return groups, mask


def _global_scale(weight: torch.Tensor, format: Format) -> torch.Tensor | None:
    if not format.has_global_scale:
        return None
    largest = weight.abs().max().float().clamp_min(1e-30)
    return largest / (448.0 * format.max_level)


def _plain_scales(
    groups: torch.Tensor, format: Format, rounder: ScaleRounder
) -> tuple[torch.Tensor, torch.Tensor | None]:
    if format.kind == "int" and not format.symmetric:
        low = groups.amin(dim=-1, keepdim=True).clamp_max(0.0)
        high = groups.amax(dim=-1, keepdim=True).clamp_min(0.0)
        scales = rounder((high - low) / format.max_code)
        return scales, round_zeros(-low / scales, format)
    extreme = extremes(groups)
    if format.kind == "int":
        return rounder(extreme / -format.midpoint), None
    if format.scale_dtype == "e8m0":
        # Magnitudes up to 7.25 saturate to 6: a scale twice as coarse costs the rest of the group more (arXiv
        # 2310.10537).
        exponent = torch.ceil(torch.log2(extreme.abs().clamp_min(2.0**-_E8M0_BIAS) / 7.25))
        return torch.exp2(exponent.clamp_min(-_E8M0_BIAS)), None
    return rounder(extreme.abs() / format.max_level), None


def _fill_blanks(scales: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """The mean scale for groups of zeros, whose placeholder of 1 would stretch the second level for all their neighbours."""
    blank = extremes(groups).abs() < scales.abs() / 2
    count = (~blank).sum()
    mean = torch.where(blank, torch.zeros_like(scales), scales).sum() / count.clamp_min(1)
    return torch.where(blank & (count > 0), mean, scales)


def _stored_grid(scales: torch.Tensor, zeros: torch.Tensor | None, format: Format, unit: torch.Tensor | None) -> Grid:
    """Bring fitted scales into their stored form."""
    stored: dict[str, torch.Tensor] = {}
    if format.scale_dtype == "e8m0":
        stored["scales"] = (torch.log2(scales) + _E8M0_BIAS).to(torch.uint8)
    elif unit is not None:
        stored["scales"] = (scales / unit).to(torch.float8_e4m3fn).view(torch.uint8)
        stored["scale_scales"] = unit.reshape(1)
    elif format.scale_block:
        stored, scales = _quantize_scales(scales, format.scale_block)
    else:
        stored["scales"] = scales.to(SCALE_TORCH_DTYPES[format.scale_dtype])
    if zeros is not None:
        stored["zeros"] = (zeros / format.zero_step).to(torch.uint8)
    return Grid(scales, zeros, stored)


def _quantize_scales(scales: torch.Tensor, block: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Double quantisation: blocks of scales as 8-bit codes around the tensor's mean."""
    offset = scales.mean().reshape(1)
    flat = (scales - offset).flatten()
    blocks = torch.nn.functional.pad(flat, (0, -flat.numel() % block)).view(-1, block)
    step = blocks.abs().amax(dim=-1).clamp_min(1e-20) / (_DQ_MIDPOINT - 1)
    codes = (blocks / step[:, None]).round() + _DQ_MIDPOINT
    # A scale that would be read as zero could not be divided by: take the next code.
    codes += (codes - _DQ_MIDPOINT) * step[:, None] + offset == 0
    read = (codes - _DQ_MIDPOINT) * step[:, None] + offset
    stored = {
        "scales": codes.flatten()[: flat.numel()].view(scales.shape).to(torch.uint8),
        "scale_scales": step,
        "scale_offset": offset,
    }
    return stored, read.flatten()[: flat.numel()].view(scales.shape)


assert set(SCALE_TORCH_DTYPES) == {name for name, bits in SCALE_BITS.items() if bits > 8}
