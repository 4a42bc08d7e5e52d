"""PackedTensor: one weight in its stored form, and the arithmetic of cutting it.

A weight [.., out, in] becomes a few plain arrays (shapes for an integer or codebook format, G groups along `in`):

    codes         int32 [.., out, words]   each row one dense bit stream, least significant bit first
    scales        [.., out, G]             fp16, bf16 or fp32; or 8 bit (see Format)
    zeros         uint8 [.., out, G]       asymmetric integers only; fine ones count 2^bits / 256 of a code
    scale_scales  fp32 [blocks]            second level: scale = scales[i] * scale_scales[i // scale_block] + scale_offset
    scale_offset  fp32 [1]
    order         int32 [in]               a permutation of the input, where an algorithm needs one
    input_range   fp32 [2]                 lowest and highest input, for a format that rounds activations to a fixed range

The bit stream equals compressed-tensors' `weight_packed`, so our saved form is theirs, byte for byte. k-quants keep
GGUF's blocks in `codes` as uint8 and have nothing else. The class holds numpy arrays or torch tensors alike and
imports neither: it only slices and names. What computes is elsewhere: `bits.py` goes between codes and the stream,
`grid.py` between a PackedTensor and the weight.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

from lowbit.errors import WeightError
from lowbit.formats import SCALE_BITS, Format

# Saved, moved and sharded under these names, in this order.
BUFFERS = ("codes", "scales", "zeros", "scale_scales", "scale_offset", "order", "input_range")
# What belongs to a weight as a whole: no cut and no choice of an expert takes a part of it.
_WHOLE = ("order", "scale_offset", "scale_scales", "input_range")


@dataclass(slots=True)
class PackedTensor:
    """A weight in its stored form. `shape` is the shape of the weight: (out, in) or (experts, out, in)."""

    format: Format
    shape: tuple[int, ...]
    codes: Any
    scales: Any = None
    zeros: Any = None
    scale_scales: Any = None
    scale_offset: Any = None
    order: Any = None
    input_range: Any = None

    def __post_init__(self) -> None:
        self.shape = tuple(int(n) for n in self.shape)
        expected = code_shape(self.format, self.shape)
        if tuple(self.codes.shape) != expected:
            raise WeightError(
                f"codes of a {self.format} weight {list(self.shape)} must have shape {list(expected)}, got {list(self.codes.shape)}"
            )
        scales = scale_shape(self.format, self.shape)
        if self.scales is not None and tuple(self.scales.shape) != scales:
            raise WeightError(
                f"scales of a {self.format} weight {list(self.shape)} must have shape {list(scales)}, got {list(self.scales.shape)}"
            )

    def tensors(self) -> dict[str, Any]:
        """The arrays that exist, by name: what is saved, moved and registered."""
        return {name: getattr(self, name) for name in BUFFERS if getattr(self, name) is not None}

    @property
    def nbytes(self) -> int:
        return sum(int(t.nbytes) for t in self.tensors().values())

    @property
    def bits_per_weight(self) -> float:
        return self.nbytes * 8 / max(math.prod(self.shape), 1)

    def with_tensors(self, tensors: dict[str, Any]) -> PackedTensor:
        """The same weight over other arrays (moved, copied, mapped)."""
        return PackedTensor(self.format, self.shape, **{name: tensors.get(name) for name in BUFFERS})

    def expert(self, index: int) -> PackedTensor:
        """One expert of a [experts, out, in] weight, sharing memory."""
        if len(self.shape) != 3:
            raise WeightError(f"a weight of shape {list(self.shape)} has no experts axis")
        parts = {n: t if n in _WHOLE else t[index] for n, t in self.tensors().items()}
        if self.format.scale_block:
            parts["scale_scales"] = self._expert_scale_scales(index)
        return PackedTensor(self.format, self.shape[1:], **parts)

    def _expert_scale_scales(self, index: int) -> Any:
        """The second-level blocks of one expert: they run through all experts, so they must end where it ends."""
        count = self.shape[-2] * self.format.groups(self.shape[-1])
        blocks, rest = divmod(count, self.format.scale_block)
        if rest:
            raise WeightError(
                f"an expert's {count} scales are no whole blocks of {self.format.scale_block}; "
                "use a format without _dq for these experts"
            )
        return self.scale_scales[index * blocks : (index + 1) * blocks]

    def shard(self, axis: int, rank: int, world: int) -> PackedTensor:
        """Rank's part of the weight cut along the output (axis 0) or the input (axis 1), sharing memory.

        The only code that knows how each array splits. A cut along the input must fall on whole groups and whole words.
        """
        if axis not in (0, 1) or not 0 <= rank < world:
            raise WeightError(
                f"cannot cut axis {axis} for rank {rank} of {world}; the axis is 0 (outputs) or 1 (inputs)"
            )
        if self.scale_scales is not None and self.format.scale_block:
            raise WeightError(
                f"{self.format} has doubly quantised scales, whose blocks cross rows; shard a format without _dq"
            )
        return self._shard_outputs(rank, world) if axis == 0 else self._shard_inputs(rank, world)

    def _shard_outputs(self, rank: int, world: int) -> PackedTensor:
        out_features = self.shape[-2]
        if out_features % world:
            raise WeightError(f"{out_features} outputs do not divide over {world} ranks")
        step = out_features // world
        rows = slice(rank * step, (rank + 1) * step)
        whole = self.format.group_size == 0
        parts = {"codes": self.codes[..., rows, :]}
        for name in ("scales", "zeros"):
            tensor = getattr(self, name)
            if tensor is not None:
                parts[name] = tensor if whole else tensor[..., rows, :]
        shape = (*self.shape[:-2], step, self.shape[-1])
        kept = {"scale_scales": self.scale_scales, "order": self.order, "input_range": self.input_range}
        return PackedTensor(self.format, shape, **parts, **kept)

    def _shard_inputs(self, rank: int, world: int) -> PackedTensor:
        in_features, format = self.shape[-1], self.format
        if self.order is not None:
            raise WeightError(
                "a weight with reordered inputs cannot be cut along the input; quantise without act-order"
            )
        step = in_features // world
        unit = format.block.weights if format.block else max(format.group_size, 1)
        if in_features % world or step % unit or (step * format.bits) % 32:
            raise WeightError(
                f"{in_features} inputs in groups of {unit} do not divide into whole groups over {world} ranks"
            )
        width = self.codes.shape[-1] // world
        parts = {"codes": self.codes[..., rank * width : (rank + 1) * width]}
        for name in ("scales", "zeros"):
            tensor = getattr(self, name)
            if tensor is not None:
                groups = format.groups(step) if format.group_size > 0 else 0
                parts[name] = tensor[..., rank * groups : (rank + 1) * groups] if groups else tensor
        kept = {"scale_scales": self.scale_scales, "input_range": self.input_range}
        return PackedTensor(format, (*self.shape[:-1], step), **parts, **kept)


def code_shape(format: Format, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the codes array of a weight."""
    block = format.block
    if block is not None:
        return (*shape[:-1], -(-shape[-1] // block.weights) * block.bytes)
    return (*shape[:-1], format.code_words(shape[-1]))


def scale_shape(format: Format, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the scales (and zeros) of a weight."""
    if format.group_size == 0:
        return (*shape[:-2], 1, 1)
    return (*shape[:-1], format.groups(shape[-1]))


def empty_buffers(format: Format, shape: tuple[int, ...], library: Any) -> dict[str, Any]:
    """Room for the arrays of a weight, made by `numpy` or `torch`. bf16 scales need torch; numpy gives their bits as uint16."""
    bfloat16 = getattr(library, "bfloat16", None) or library.uint16
    small = SCALE_BITS[format.scale_dtype] == 8
    scale_dtype = (
        library.uint8
        if small
        else bfloat16
        if format.scale_dtype == "bfloat16"
        else getattr(library, format.scale_dtype)
    )
    buffers = {
        "codes": library.empty(code_shape(format, shape), dtype=library.uint8 if format.block else library.int32)
    }
    if format.block:
        return buffers
    buffers["scales"] = library.empty(scale_shape(format, shape), dtype=scale_dtype)
    if not format.symmetric:
        buffers["zeros"] = library.empty(scale_shape(format, shape), dtype=library.uint8)
    if format.has_global_scale:
        buffers["scale_scales"] = library.empty((1,), dtype=library.float32)
    if format.scale_block:
        buffers["scales"] = library.empty(scale_shape(format, shape), dtype=library.uint8)
        count = math.prod(scale_shape(format, shape))
        buffers["scale_scales"] = library.empty((-(-count // format.scale_block),), dtype=library.float32)
        buffers["scale_offset"] = library.empty((1,), dtype=library.float32)
    return buffers


assert {field.name for field in fields(PackedTensor)} == {"format", "shape", *BUFFERS}
