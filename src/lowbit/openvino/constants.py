"""Which of OpenVINO's types holds the numbers of a `Format`, code for code.

A constant of the IR is an array of small numbers, and the graph behind it makes the weight:

    Constant [.., out, groups, group] -> Convert -> Subtract(zeros) -> Multiply(scales) -> Reshape [.., out, in]

which the plugins fold into the product: the weight stays as small in memory as in the file. `hold` gives the arrays:

    format                    type       zeros            what is done
    int4, int3  symmetric     i4         -                codes less the midpoint
    int2        symmetric     u2         2, for all       the stream as it is
    int5..int8  symmetric     i8         -                codes less the midpoint
    int2..int4  _asym         u4         u4               codes as they are (u2 with zeros of groups: see below)
    int5..int8  _asym         u8         u8               codes as they are
    int2..int5  _fine         u4, u8     f16, exact       fractions of a code are multiples of 1/64 or more below 32
    nf4                       nf4        -                codes as they are
    fp4_e2m1 mxfp4 nvfp4      f4e2m1     -                codes and 8-bit scales as they are
    fp8_e4m3, fp8_e5m2        f8..       -                codes as they are; plugins widen these at every inference
    fp6                       i8         -                eight times each level is a whole number
    q4_k q2_k q5_k q4_1 q5_1  u4, u8     f32              codes; minimum / scale as a zero point
    q3_k, q6_k                i4, i8     -                codes; the products of their scales in f32
    fp4, nf3, fp6_e3m2        i8         -                levels rounded to 120 or 127 steps: a note says so

Experts lie in one constant, which the CPU plugin reads packed in 4 and 8 bits of integers alone: there int2 is i4, and
fp4_e2m1, mxfp4 and nvfp4 are i8, whose levels doubled are whole numbers: the numbers stay the same.

Types without a place here would be wider in memory (u3), and u2 with a zero for each group is refused by the CPU plugin
when it rounds activations. Scales are f16 where f16 holds them exactly, and f32 otherwise (bf16, double quantisation).
A group size that does not divide the inputs becomes one that does, with scales repeated: the numbers stay the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowbit.core import calls
from lowbit.formats import LEVELS
from lowbit.packing import PackedTensor

Array = NDArray[Any]
_DIRECT = {"nf4": "nf4", "e2m1": "f4e2m1", "e4m3": "f8e4m3", "e5m2": "f8e5m2"}
# Steps from zero to the largest level: 120 for fp4, whose levels are then whole but for one (1/192 as 0.6 of a step).
_STEPS = {"fp4_bnb": 120, "nf3": 127, "nf3_bigdl": 127, "e3m2": 127}
_E8M0_BIAS = np.float32(127)
_SCALE_MIDPOINT = np.float32(128)  # doubly quantised scales are signed around it
# Tables whose levels are whole numbers once they are multiplied.
_WHOLE = {"e2m3": 8, "e2m1": 2}
_MATRIX = 2  # axes; a stack of experts has another
_WIDTHS = {"u2": 2, "u4": 4, "i4": 4, "nf4": 4, "f4e2m1": 4}
WIDENED = ("f8e4m3", "f8e5m2")


@dataclass(frozen=True)
class Numbers:
    """A constant as it will lie in the file: bytes or typed numbers, row by row, and what they are."""

    array: Array
    shape: tuple[int, ...]
    type: str


@dataclass(frozen=True)
class Held:
    """w = (codes - zeros) * scales * factor, [.., out, groups, group]."""

    codes: Numbers
    scales: Numbers
    zeros: Numbers | None = None
    factor: float | None = None
    order: Array | None = None  # input j of the codes is input order[j] of the weight
    note: str = ""

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's, [.., out, in]."""
        *rows, groups, group = self.codes.shape
        return (*rows, groups * group)


@dataclass(frozen=True)
class _Grid:
    """What a format says with whole groups: codes uint8 [.., out, in], the rest [.., out, groups of `group` inputs]."""

    type: str
    codes: Array
    group: int
    scales: Array
    zeros: Array | None = None
    scale_type: str = ""
    factor: float | None = None
    note: str = ""


def hold(packed: PackedTensor) -> Held:
    """The arrays of a packed weight in OpenVINO's types. Arrays may be numpy's or torch's."""
    packed = packed.with_tensors({name: array_of(tensor) for name, tensor in packed.tensors().items()})
    grid = _grid(packed)
    *rows, in_features = packed.shape
    group = in_features if grid.group <= 0 else math.gcd(grid.group, in_features)
    index = np.arange(0, in_features, group) // (in_features if grid.group <= 0 else grid.group)
    codes = Numbers(_dense(grid, in_features), (*rows, len(index), group), grid.type)
    scales = _spread(grid.scales, index, rows)
    kind = grid.scale_type or _float_type(scales)
    scales = scales if grid.scale_type else scales.astype(kind)
    zeros = None if grid.zeros is None else _zeros(grid, index, rows)
    return Held(
        codes,
        Numbers(np.ascontiguousarray(scales), (*scales.shape, 1), _TYPES.get(kind, kind)),
        zeros,
        grid.factor,
        packed.order,
        grid.note,
    )


def plain_scales(packed: PackedTensor) -> PackedTensor:
    """The same weight with doubly quantised scales multiplied out, which no longer hang together across rows."""
    if not packed.format.scale_block:
        return packed
    arrays = {name: array_of(tensor) for name, tensor in packed.tensors().items()}
    scales = effective_scales(packed.with_tensors(arrays))
    kept = {name: arrays[name] for name in ("codes", "zeros", "order") if name in arrays}
    format = packed.format.replace(scale_block=0, scale_dtype="float32")
    return PackedTensor(format, packed.shape, scales=scales, **kept)


def hold_dense(array: Array, dtype: str) -> Numbers:
    """Plain numbers: f16 where that holds them (f32 stays f32), bf16 from its bits."""
    return Numbers(np.ascontiguousarray(array), array.shape, {"bfloat16": "bf16", **_TYPES}[dtype])


def array_of(tensor: Any) -> Array:
    """A numpy array over what may be a torch tensor; bfloat16 comes as its bits."""
    if isinstance(tensor, np.ndarray):
        return tensor
    tensor = tensor.detach().cpu()
    if str(tensor.dtype) == "torch.bfloat16":
        import torch  # it is there: the tensor is its

        return np.asarray(tensor.view(torch.int16).numpy().view(np.uint16))
    return np.asarray(tensor.numpy())


_TYPES = {"float16": "f16", "float32": "f32"}


def _spread(values: Array, index: Array, rows: list[int]) -> Array:
    """Numbers of groups for the groups that the constant has; of a tensor, for every row."""
    if values.shape[-2:] == (1, 1) and rows[-1] != 1:
        values = np.broadcast_to(values, (*rows, 1))
    return np.ascontiguousarray(values[..., index])


def _zeros(grid: _Grid, index: Array, rows: list[int]) -> Numbers:
    assert grid.zeros is not None
    if grid.zeros.ndim == 0:
        return Numbers(grid.zeros.reshape(1).astype(np.uint8), (1,) * (len(rows) + 2), "u8")
    zeros = _spread(grid.zeros, index, rows)
    shape = (*zeros.shape, 1)
    if zeros.dtype == np.uint8 and grid.type == "u4":
        return Numbers(pack_numbers(zeros.reshape(1, -1), 4), shape, "u4")
    return Numbers(zeros, shape, "u8" if zeros.dtype == np.uint8 else _TYPES[str(zeros.dtype)])


def _dense(grid: _Grid, in_features: int) -> Array:
    """Codes as the IR has them, the first in the lowest bits of a byte and no gaps between rows."""
    width = _WIDTHS.get(grid.type, 8)
    if grid.codes.dtype == np.uint8 and grid.codes.shape[-1] * 8 == in_features * width:
        return np.ascontiguousarray(grid.codes)  # they lie so already
    return pack_numbers(grid.codes.reshape(1, -1), width)


def pack_numbers(codes: Array, width: int) -> Array:
    if width == 8:
        return np.ascontiguousarray(codes)
    per_byte = 8 // width
    flat = np.pad(codes.ravel(), (0, -codes.size % per_byte)).reshape(-1, per_byte)
    packed = flat[:, 0].copy()
    for place in range(1, per_byte):
        packed |= flat[:, place] << np.uint8(width * place)
    return packed


def _unpacked(packed: PackedTensor) -> Array:
    """Codes one in a byte, [.., out, in]."""
    words = np.ascontiguousarray(packed.codes)
    rows, columns = math.prod(packed.shape[:-1]), packed.shape[-1]
    values = np.empty(packed.shape, np.uint8)
    calls.unpack(packed.format.bits, rows, columns, words.ctypes.data, values.ctypes.data)
    return values


def _stream(packed: PackedTensor) -> Array | None:
    """The bytes of codes whose rows fill whole words, which are what OpenVINO stores; None for others."""
    bits = packed.format.bits
    whole = bits in (2, 4, 8) and packed.shape[-1] * bits % 32 == 0
    return np.ascontiguousarray(packed.codes).view(np.uint8) if whole else None


def _grid(packed: PackedTensor) -> _Grid:
    format = packed.format
    if format.kind == "kquant":
        return _of_blocks(packed)
    if format.kind == "int":
        return _of_integers(packed)
    return _of_levels(packed)


def _of_integers(packed: PackedTensor) -> _Grid:
    format, bits = packed.format, packed.format.bits
    scales, stream = effective_scales(packed), _stream(packed)
    if not format.symmetric:
        step = np.float16(format.zero_step)
        zeros = packed.zeros * step if format.fine_zeros else packed.zeros
        codes = stream if stream is not None and bits in (4, 8) else _unpacked(packed)
        return _Grid("u8" if bits > 4 else "u4", codes, format.group_size, scales, zeros)
    if bits == 2 and len(packed.shape) == _MATRIX:
        codes = _unpacked(packed) if stream is None else stream
        return _Grid("u2", codes, format.group_size, scales, np.array(format.midpoint))
    flip = {4: np.uint8(0x88), 8: np.uint8(0x80)}.get(bits)  # two's complement is the code with its top bit turned
    if stream is not None and flip is not None:
        return _Grid("i4" if bits == 4 else "i8", stream ^ flip, format.group_size, scales)
    signed = _unpacked(packed) - np.uint8(format.midpoint)
    return (
        _Grid("i4", signed & np.uint8(15), format.group_size, scales)
        if bits < 5
        else _Grid("i8", signed, format.group_size, scales)
    )


def _of_levels(packed: PackedTensor) -> _Grid:
    format, table, stacked = packed.format, packed.format.table, len(packed.shape) > _MATRIX
    if table in _DIRECT and not (stacked and table in _WHOLE):
        kind = {"e8m0": "f8e8m0", "e4m3": "f8e4m3"}.get(format.scale_dtype, "")
        scales = packed.scales if kind else effective_scales(packed)
        factor = float(packed.scale_scales[0]) if format.has_global_scale else None
        stream = _stream(packed)
        codes = _unpacked(packed) if stream is None else stream
        note = f"experts in {format} are widened at every inference: int4 is faster" if stacked else ""
        return _Grid(_DIRECT[table], codes, format.group_size, scales, None, kind, factor, note)
    unit = _WHOLE.get(table) or _STEPS[table] / format.max_level
    steps = np.rint(np.array(format.levels) * unit).astype(np.int8).view(np.uint8)
    note = "" if table in _WHOLE else f"{format} has no type in OpenVINO: its levels are rounded to steps of 8 bits"
    scales = (effective_scales(packed).astype(np.float64) / unit).astype(np.float32)
    return _Grid("i8", steps[_unpacked(packed)], format.group_size, scales, note=note)


def _of_blocks(packed: PackedTensor) -> _Grid:
    """GGUF's blocks: codes, and scales and minima multiplied out."""
    import torch  # the readers of these blocks are written in it

    from lowbit.kquants import LAYOUTS, read_blocks
    from lowbit.small_blocks import read_small

    rows, format = packed.shape[:-1], packed.format
    block = format.block
    assert block is not None
    data = torch.from_numpy(np.array(packed.codes)).reshape(-1, block.bytes)
    if format.name in LAYOUTS:
        layout = LAYOUTS[format.name]
        found = read_blocks(data, layout)
        codes, scales, minima = found.codes, found.d * found.scales, found.dmin * found.minima
        group = block.weights // layout.sub_blocks
        midpoint, signed = layout.midpoint, not layout.minimum_high
    else:
        scales, minima, codes = read_small(data, format)
        minima, group, midpoint, signed = -minima, block.weights, 0, False
    whole = codes.to(torch.uint8).numpy().reshape(*rows, -1)[..., : packed.shape[-1]]
    steps = scales.float().numpy().reshape(*rows, -1)
    if signed:
        type, mask = ("i4", 15) if format.bits <= 4 else ("i8", 255)
        return _Grid(type, (whole - np.uint8(midpoint)) & np.uint8(mask), group, steps)
    lows = minima.float().numpy().reshape(*rows, -1)
    # A sub-block without a scale is its minimum alone: codes of 0 that count from there, in steps of 1.
    flat = steps == 0
    if flat.any():
        per_input = np.repeat(flat, group, axis=-1)[..., : packed.shape[-1]]
        whole = np.where(per_input, np.uint8(0), whole)
    steps = np.where(flat, np.float32(1), steps)
    return _Grid("u8" if format.bits > 4 else "u4", whole, group, steps, (lows / steps).astype(np.float32))


def effective_scales(packed: PackedTensor) -> Array:
    """The scales as numbers, f16 or f32; doubly quantised ones multiplied out, 8-bit floats with their factor."""
    format, scales = packed.format, packed.scales
    if format.scale_dtype == "e8m0":
        return np.asarray(np.exp2(scales.astype(np.float32) - _E8M0_BIAS), np.float32)
    if format.has_global_scale:
        return np.asarray(np.array(LEVELS["e4m3"], np.float32)[scales] * packed.scale_scales[0], np.float32)
    if format.scale_block:
        blocks = np.repeat(packed.scale_scales, format.scale_block)[: scales.size].reshape(scales.shape)
        return np.asarray((scales.astype(np.float32) - _SCALE_MIDPOINT) * blocks + packed.scale_offset, np.float32)
    if format.scale_dtype == "bfloat16":
        return np.asarray((scales.astype(np.uint32) << 16).view(np.float32))
    return np.asarray(scales)


def _float_type(values: Array) -> str:
    """float16 where it holds the numbers exactly."""
    if values.dtype == np.float16:
        return "float16"
    with np.errstate(over="ignore"):
        return "float16" if np.array_equal(values.astype(np.float16).astype(np.float32), values) else "float32"
