"""GPTQ's linears: the same codes under other names, packed along the inputs.

    theirs  qweight int32 [in * bits / 32, out]    qzeros int32 [G, out * bits / 32]    scales [G, out]    g_idx [in]
    ours    codes int32 [out, words]               zeros uint8 [out, G]                 scales [out, G]    order [in]

A column of qweight is a row of ours, word for word, at every width. Zero points are stored less one (`zero_shift`; files that say
"gptq_v2" store them as they are), and one that is the middle everywhere is a symmetric format. g_idx gives the group of each input:
where groups are not runs of inputs (act-order), inputs are sorted by group and `order` says how.

What Neural Compressor wrote before it took these names has everything along the outputs:

    packed_weight int32 [out, words]    packed_zp int32 [out, G * bits / 32]    scale [out, G]
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from lowbit.bits import pack_codes, unpack_codes
from lowbit.errors import CheckpointError
from lowbit.formats import PER_CHANNEL, Format
from lowbit.packing import PackedTensor

WEIGHT, ZEROS, SCALES, GROUP_OF_INPUT = "qweight", "qzeros", "scales", "g_idx"
NAMES = (WEIGHT, ZEROS, SCALES, GROUP_OF_INPUT)
OLD_WEIGHT, OLD_ZEROS, OLD_SCALES = "packed_weight", "packed_zp", "scale"
_WORD = 32
_SCALE_DTYPES = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}


def read_gptq(
    path: str, tensors: Mapping[str, torch.Tensor], shape: tuple[int, int], zero_shift: int = 1
) -> PackedTensor:
    """A linear of theirs as a weight [out, in]; `tensors` by the last part of their names."""
    if OLD_WEIGHT in tensors:
        return _read_old(path, tensors, shape)
    for name in (WEIGHT, SCALES):
        if name not in tensors:
            raise CheckpointError(f"{path}: the checkpoint lacks its {name}")
    outputs, inputs = shape
    words = tensors[WEIGHT]
    bits = words.shape[0] * _WORD // max(inputs, 1)
    if words.dim() != 2 or words.shape[1] != outputs or bits * inputs != words.shape[0] * _WORD or not 2 <= bits <= 8:
        raise CheckpointError(f"{path}: a {WEIGHT} {list(words.shape)} does not fit a linear [{outputs}, {inputs}]")
    scales = tensors[SCALES].t().contiguous()
    zeros = None
    if tensors.get(ZEROS) is not None:
        zeros = unpack_codes(tensors[ZEROS].contiguous(), bits, outputs).t()
        zeros = ((zeros.to(torch.int16) + zero_shift) & ((1 << bits) - 1)).to(torch.uint8).contiguous()
    codes = words.t().contiguous()
    order = _order(path, tensors.get(GROUP_OF_INPUT), scales.shape[1])
    if order is not None:
        codes = pack_codes(unpack_codes(codes, bits, inputs)[:, order.long()].contiguous(), bits)
    return assemble(path, shape, bits, codes, scales, zeros, order)


def _read_old(path: str, tensors: Mapping[str, torch.Tensor], shape: tuple[int, int]) -> PackedTensor:
    outputs, inputs = shape
    words, scales, packed = tensors[OLD_WEIGHT], tensors.get(OLD_SCALES), tensors.get(OLD_ZEROS)
    if scales is None or packed is None:
        raise CheckpointError(f"{path}: the checkpoint lacks its {OLD_SCALES if scales is None else OLD_ZEROS}")
    bits = words.shape[-1] * _WORD // max(inputs, 1)
    if tuple(words.shape) != (outputs, inputs * bits // _WORD) or not 2 <= bits <= 8:
        raise CheckpointError(f"{path}: a {OLD_WEIGHT} {list(words.shape)} does not fit a linear [{outputs}, {inputs}]")
    zeros = unpack_codes(packed.contiguous(), bits, scales.shape[1])
    return assemble(path, shape, bits, words.contiguous(), scales.contiguous(), zeros, None)


def _order(path: str, group_of: torch.Tensor | None, groups: int) -> torch.Tensor | None:
    """The inputs sorted by group; None where groups are runs of inputs already."""
    if group_of is None or not len(group_of) or groups == 1 or not bool((group_of.diff() < 0).any()):
        return None
    sizes = group_of.bincount(minlength=groups)
    if len(sizes) != groups or bool((sizes[:-1] != sizes[0]).any()) or bool(sizes[-1] > sizes[0]):
        raise CheckpointError(
            f"{path}: its {GROUP_OF_INPUT} makes groups of different sizes, which lowbit does not read"
        )
    return torch.argsort(group_of, stable=True).to(torch.int32)


def assemble(
    path: str,
    shape: tuple[int, int],
    bits: int,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    order: torch.Tensor | None,
) -> PackedTensor:
    """A weight from codes int32 [out, words], scales [out, G] and zero points uint8 [out, G], with the format that they have."""
    outputs, inputs = shape
    if scales.dim() != 2 or len(scales) != outputs or (zeros is not None and zeros.shape != scales.shape):
        found = [list(scales.shape)] + ([] if zeros is None else [list(zeros.shape)])
        raise CheckpointError(f"{path}: scales and zero points {found} do not fit a linear [{outputs}, {inputs}]")
    if scales.dtype not in _SCALE_DTYPES:
        raise CheckpointError(f"{path}: its scales are {scales.dtype}, and floating point numbers are meant")
    middle = 1 << (bits - 1)
    symmetric = zeros is None or bool((zeros == middle).all())
    format = Format(f"int{bits}", bits).replace(
        symmetric=symmetric,
        group_size=group_size_of(path, inputs, scales.shape[1]),
        scale_dtype=_SCALE_DTYPES[scales.dtype],
    )
    return PackedTensor(format, shape, codes, scales, None if symmetric else zeros, order=order)


def group_size_of(path: str, inputs: int, groups: int) -> int:
    """The size of so many groups; the last may be shorter, and sizes are powers of two then."""
    if groups == 1:
        return PER_CHANNEL
    size = inputs // groups if inputs % groups == 0 else 1 << (-(-inputs // groups) - 1).bit_length()
    if groups < 1 or -(-inputs // size) != groups:
        raise CheckpointError(f"{path}: {groups} groups do not cut {inputs} inputs into equal parts")
    return size
