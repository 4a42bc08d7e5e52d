"""A weight as a file holds it: plain numbers, or packed; and the arithmetic of putting one together from its pieces.

Families fuse and files split: q, k and v may be one weight or three, the experts of a layer one weight or a hundred.
The spec says which pieces make a weight (`Located`), and here they are joined: pieces of one matrix one above the
other, experts along a new axis. Arrays are numpy's; bfloat16 is its bits in uint16.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowbit.core import calls
from lowbit.errors import CheckpointError
from lowbit.formats import Format
from lowbit.packing import PackedTensor, empty_buffers
from lowbit.search import Search, worth_searching

# Plain element types: safetensors' name and GGUF's, and ours.
DENSE_TYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_SPLIT_BUFFERS = ("codes", "scales", "zeros")


@dataclass(frozen=True)
class Dense:
    """Plain numbers [.., out, in] or a vector: float32, float16, or bfloat16 as its bits in uint16."""

    array: NDArray[Any]
    dtype: str

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    def float32(self) -> NDArray[np.float32]:
        """The numbers in fp32, as a copy unless they are already."""
        if self.dtype == "bfloat16":
            return (self.array.astype(np.uint32) << 16).view(np.float32)
        return np.asarray(self.array, np.float32)

    def transposed(self) -> Dense:
        return Dense(np.ascontiguousarray(self.array.swapaxes(-1, -2)), self.dtype)


Weight = Dense | PackedTensor


def join_rows(pieces: Sequence[Weight]) -> Weight:
    """Matrices one above the other."""
    if len(pieces) == 1:
        return pieces[0]
    return _join(pieces, lambda arrays: np.concatenate(arrays, axis=-2 if arrays[0].ndim > 1 else 0))


def stack(pieces: Sequence[Weight]) -> Weight:
    """Matrices along a new first axis."""
    return _join(pieces, np.stack)


def _join(pieces: Sequence[Weight], join: Any) -> Weight:
    first = pieces[0]
    if isinstance(first, Dense):
        if not all(isinstance(piece, Dense) and piece.dtype == first.dtype for piece in pieces):
            numbers = [piece.float32() for piece in pieces if isinstance(piece, Dense)]
            if len(numbers) != len(pieces):
                raise CheckpointError(
                    "some pieces of one weight are packed and others are not, which the engine cannot join"
                )
            return Dense(join(numbers), "float32")
        return Dense(join([piece.array for piece in pieces if isinstance(piece, Dense)]), first.dtype)
    packed = [piece for piece in pieces if isinstance(piece, PackedTensor) and piece.format == first.format]
    if len(packed) != len(pieces):
        raise CheckpointError("the pieces of one weight have different formats, which the engine cannot join")
    if first.format.group_size == 0 or first.scale_scales is not None:
        raise CheckpointError(
            f"pieces of {first.format} have a scale for each piece and cannot be joined to one weight"
        )
    buffers = {
        name: join([getattr(p, name) for p in packed]) for name in _SPLIT_BUFFERS if getattr(first, name) is not None
    }
    rows = join([np.empty((*p.shape[:-1], 0), np.uint8) for p in packed]).shape[:-1]
    return PackedTensor(first.format, (*rows, first.shape[-1]), **buffers)


def quantize_dense(weight: Dense, format: Format, search: Search) -> PackedTensor:
    """Round plain numbers [.., out, in] in the core."""
    array = np.require(weight.array, requirements=("C", "A"))
    buffers = empty_buffers(format, array.shape, np)
    if format.kind == "int":
        search = worth_searching(search, format.bits, format.group_size if format.group_size > 0 else array.shape[-1])
    rows = array.reshape(-1, array.shape[-1])
    calls.quantize(
        format,
        calls.Rows(rows.ctypes.data, weight.dtype, rows.shape[0], rows.shape[1]),
        addresses(buffers),
        search.ratios(),
        search.zero_steps,
    )
    return PackedTensor(format, array.shape, **buffers)


def dequantize(packed: PackedTensor) -> Dense:
    """The numbers that a packed weight stands for, in fp32."""
    weight = np.empty(packed.shape, np.float32)
    buffers = {name: np.ascontiguousarray(array) for name, array in packed.tensors().items()}
    rows = calls.Rows(weight.ctypes.data, "float32", weight.size // packed.shape[-1], packed.shape[-1])
    calls.dequantize(packed.format, addresses(buffers), rows)
    return Dense(weight, "float32")


def addresses(buffers: dict[str, NDArray[Any]]) -> calls.Canonical:
    """Where the canonical buffers of a weight lie; they must be contiguous and stay alive."""
    return calls.Canonical.of({name: int(array.ctypes.data) for name, array in buffers.items()})
