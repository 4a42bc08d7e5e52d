"""AWQ's linears (the layout "gemm"): codes packed along the outputs, eight to a word, in an order of their own.

    theirs  qweight int32 [in, out / 8]    qzeros int32 [G, out / 8]    scales [G, out]
    ours    codes int32 [out, words]       zeros uint8 [out, G]         scales [out, G]

Nibble i of a word is the output _OUTPUTS[i] of its eight: even ones first. Zero points are stored as they are.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from lowbit.bits import pack_codes
from lowbit.errors import CheckpointError
from lowbit.interop.gptq import SCALES, WEIGHT, ZEROS, assemble
from lowbit.packing import PackedTensor

_BITS, _PER_WORD = 4, 8
_OUTPUTS = (0, 2, 4, 6, 1, 3, 5, 7)


def read_awq(path: str, tensors: Mapping[str, torch.Tensor], shape: tuple[int, int]) -> PackedTensor:
    """A linear of theirs as a weight [out, in]; `tensors` by the last part of their names."""
    for name in (WEIGHT, ZEROS, SCALES):
        if tensors.get(name) is None:
            raise CheckpointError(f"{path}: the checkpoint lacks its {name}")
    outputs, inputs = shape
    if tuple(tensors[WEIGHT].shape) != (inputs, outputs // _PER_WORD) or outputs % _PER_WORD:
        raise CheckpointError(
            f"{path}: a {WEIGHT} {list(tensors[WEIGHT].shape)} does not fit a linear [{outputs}, {inputs}] of AWQ's layout gemm"
        )
    codes = pack_codes(_spread(tensors[WEIGHT]).t().contiguous(), _BITS)
    zeros = _spread(tensors[ZEROS]).t().contiguous()
    return assemble(path, shape, _BITS, codes, tensors[SCALES].t().contiguous(), zeros, None)


def _spread(words: torch.Tensor) -> torch.Tensor:
    """int32 [n, out / 8] as uint8 codes [n, out]."""
    codes = torch.empty(*words.shape, _PER_WORD, dtype=torch.uint8)
    for nibble, output in enumerate(_OUTPUTS):
        codes[..., output] = ((words >> (_BITS * nibble)) & 0xF).to(torch.uint8)
    return codes.flatten(-2)
