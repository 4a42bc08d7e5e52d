"""GGUF's small blocks as packed weights, number for number.

    Q4_0   d fp16, 16 bytes of nibbles            w = d * (q - 8)      -> int4_g32
    Q5_0   d fp16, 4 bytes of fifth bits, nibbles w = d * (q - 16)     -> int5_g32
    Q8_0   d fp16, 32 signed bytes                w = d * q            -> int8_g32
    MXFP4  exponent byte, nibbles                 w = 2^(e-127) * e2m1 -> mxfp4

A block holds 32 weights; byte i of the nibbles has weight i in its lower half and weight i + 16 in its upper half.
k-quants, Q4_1 and Q5_1 keep their blocks. What has no equal here (the iq types, ternaries) is read as numbers and
rounded to `NEAREST`, whose grid is more than ten times finer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowbit.core import calls
from lowbit.core.library import BLOCK_TYPES
from lowbit.formats import format_from_name
from lowbit.packing import PackedTensor, code_shape

Bytes = NDArray[np.uint8]
NEAREST = "int8_g32"
_BLOCK = 32
_FP16_BYTES = 2


def packed_blocks(rows: Bytes, kind: str, columns: int) -> PackedTensor | None:
    """The rows [out, bytes] of a GGUF type as a packed weight the core can run, or None where there is no equal."""
    shape = (len(rows), columns)
    if kind.lower() in BLOCK_TYPES:
        return PackedTensor(format_from_name(kind.lower()), shape, np.ascontiguousarray(rows))
    if kind not in _READERS:
        return None
    name, block_bytes, scale_bytes, read_codes = _READERS[kind]
    format = format_from_name(name)
    blocks = rows.reshape(len(rows), -1, block_bytes)
    scales = np.ascontiguousarray(blocks[..., :scale_bytes])
    values = np.ascontiguousarray(read_codes(blocks[..., scale_bytes:]).reshape(shape))
    codes = np.empty(code_shape(format, shape), np.int32)
    calls.pack(format.bits, len(rows), columns, values.ctypes.data, codes.ctypes.data)
    typed: NDArray[Any] = scales[..., 0] if scale_bytes == 1 else scales.view(np.float16)[..., 0]
    return PackedTensor(format, shape, codes, np.ascontiguousarray(typed))


def _nibbles(data: Bytes) -> Bytes:
    codes: Bytes = np.concatenate([data & np.uint8(15), data >> np.uint8(4)], axis=-1)
    return codes


def _q5_codes(data: Bytes) -> Bytes:
    fifth = np.unpackbits(data[..., :4], axis=-1, bitorder="little")
    codes: Bytes = _nibbles(data[..., 4:]) | (fifth << np.uint8(4))
    return codes


def _q8_codes(data: Bytes) -> Bytes:
    codes: Bytes = data ^ np.uint8(128)  # two's complement to the distance from -128
    return codes


# GGUF's type: format, bytes of a block, bytes of its scale, how the codes are read.
_READERS: dict[str, tuple[str, int, int, Callable[[Bytes], Bytes]]] = {
    "Q4_0": ("int4_g32", 18, _FP16_BYTES, _nibbles),
    "Q5_0": ("int5_g32", 22, _FP16_BYTES, _q5_codes),
    "Q8_0": ("int8_g32", 34, _FP16_BYTES, _q8_codes),
    "MXFP4": ("mxfp4", 17, 1, _nibbles),
}
