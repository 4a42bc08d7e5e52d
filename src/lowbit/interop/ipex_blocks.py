"""The packed weights of BigDL-LLM and ipex-llm, as their `save_low_bit` wrote them: bytes in, a PackedTensor out.

A weight [out, in] is one run of bytes, row after row, each row blocks of 64 weights (256 for the k-quants, which are GGUF's). A
block is a few fields one after another:

    half, float     d, the scale, in fp16 or fp32          least      m, the minimum, in fp16
    nibbles         4 bits: byte i holds weight i low and weight i + 32 high
    pairs           4 bits: byte i holds weight 2i low and weight 2i + 1 high
    bits            1 bit: bit i of the field is that of weight i
    quarters        2 bits: byte i holds weights i, i + 16, i + 32 and i + 48, the first lowest
    signed, bytes   8 bits

Nothing is rounded: each type has a format of ours with the same numbers. One with a minimum becomes two of GGUF's blocks of 32
with the same d and m, because that minimum need not be a whole number of steps.

The structures are those of the only public header (ipex-llm's patch of vLLM for GPUs). It names the fields, not the order of bits
inside them; for `inferred` types that order is taken from the other types', and a warning says so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from lowbit.bits import pack_codes
from lowbit.errors import CheckpointError
from lowbit.formats import Format, format_from_name
from lowbit.packing import PackedTensor
from lowbit.small_blocks import write_small

_BLOCK = 64
_SMALL = 32


@dataclass(frozen=True)
class OldType:
    """One of their types: our format with the same numbers, and the fields of a block in their order."""

    format: str
    fields: tuple[tuple[str, int], ...] = ()
    inferred: bool = False

    @property
    def weights(self) -> int:
        block = format_from_name(self.format).block
        return _BLOCK if self.fields or block is None else block.weights

    @property
    def bytes(self) -> int:
        block = format_from_name(self.format).block
        return sum(_BYTES[name] for name, _ in self.fields) if self.fields or block is None else block.bytes

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """How many bytes a weight takes; 0 where its rows are no whole blocks, which was never packed."""
        return 0 if shape[-1] % self.weights else math.prod(shape) // self.weights * self.bytes


_BYTES = {
    "half": 2, "least": 2, "float": 4, "nibbles": 32, "pairs": 32, "bits": 8, "quarters": 16, "signed": 64, "bytes": 64,
}  # fmt: skip
# Each field with the place of its bits in the code.
_FOUR_BITS = (("half", 0), ("nibbles", 0))
_EIGHT_BITS = (("float", 0), ("bytes", 0))
OLD_TYPES: dict[str, OldType] = {
    "sym_int4": OldType("int4", _FOUR_BITS),
    "woq_int4": OldType("int4", (("half", 0), ("pairs", 0))),
    "asym_int4": OldType("q4_1", (("half", 0), ("least", 0), ("nibbles", 0))),
    "sym_int5": OldType("int5", (("half", 0), ("bits", 4), ("nibbles", 0))),
    "asym_int5": OldType("q5_1", (("half", 0), ("least", 0), ("bits", 4), ("nibbles", 0))),
    "sym_int8": OldType("int8_fp32", (("float", 0), ("signed", 0))),
    "nf4": OldType("nf4", _FOUR_BITS),
    "nf3": OldType("nf3", (("half", 0), ("bits", 2), ("quarters", 0)), inferred=True),
    "fp4": OldType("fp4", _FOUR_BITS, inferred=True),
    "fp6": OldType("fp6", (("nibbles", 0), ("quarters", 4), ("half", 0)), inferred=True),
    "fp8": OldType("fp8_e5m2_fp32", _EIGHT_BITS),
    "fp8_e5m2": OldType("fp8_e5m2_fp32", _EIGHT_BITS),
    "fp8_e4m3": OldType("fp8_e4m3_fp32", _EIGHT_BITS),
    "q2_k": OldType("q2_k"),
    "q4_k": OldType("q4_k"),
    "q5_k": OldType("q5_k"),
    "q6_k": OldType("q6_k"),
}
_RTN = "it was made for NPUs, whose folders have another form"
UNREADABLE: dict[str, str] = {
    "mixed_fp4": "it does not say which layers are sym_int4 and which fp4",
    "mixed_fp8": "it does not say which layers are sym_int8 and which fp8_e4m3",
    "torch_fp8": "the scale of each weight was not saved with it",
    "torch_fp8_e5m2": "the scale of each weight was not saved with it",
    "torch_fp8_e4m3": "the scale of each weight was not saved with it",
    "fp6_k": "what its blocks hold was never published",
    "gguf_iq1_s": "the iq types need grids that lowbit does not have",
    "gguf_iq1_m": "the iq types need grids that lowbit does not have",
    "gguf_iq2_xs": "the iq types need grids that lowbit does not have",
    "gguf_iq2_xxs": "the iq types need grids that lowbit does not have",
    "sym_int4_rtn": _RTN,
    "sym_int8_rtn": _RTN,
    "asym_int4_rtn": _RTN,
}


def read_blocks(name: str, data: torch.Tensor, old: str, shape: tuple[int, ...]) -> PackedTensor:
    """The weight `name` of a shape [out, in] from its bytes; `old` is the type's old name."""
    kind = OLD_TYPES[old]
    flat = data.reshape(-1).contiguous().view(torch.uint8)
    if flat.numel() != kind.nbytes(shape):
        raise CheckpointError(
            f"{name} has {flat.numel()} bytes, and a {old} weight {list(shape)} takes {kind.nbytes(shape)}: "
            "the folder is damaged, or of another version of ipex-llm"
        )
    format = format_from_name(kind.format)
    if not kind.fields:
        return PackedTensor(format, shape, codes=flat.view(*shape[:-1], -1))
    blocks = flat.view(-1, kind.bytes)
    codes = torch.zeros(len(blocks), _BLOCK, dtype=torch.uint8)
    numbers: dict[str, torch.Tensor] = {}
    begin = 0
    for field, place in kind.fields:
        raw = blocks[:, begin : begin + _BYTES[field]].contiguous()
        begin += _BYTES[field]
        if field in ("half", "least", "float"):
            numbers[field] = raw.view(torch.float32 if field == "float" else torch.float16)
        else:
            codes |= _codes(field, raw) << place
    if "least" in numbers:
        return PackedTensor(format, shape, codes=_halves(numbers, codes, format).view(*shape[:-1], -1))
    scale = numbers["float" if "float" in numbers else "half"]
    packed = pack_codes(codes.view(*shape[:-1], -1), format.bits)
    return PackedTensor(format, shape, codes=packed, scales=scale.reshape(*shape[:-1], -1))


def _codes(field: str, raw: torch.Tensor) -> torch.Tensor:
    """One field of each block [blocks, bytes] as a part of the codes [blocks, 64]."""
    match field:
        case "nibbles":
            return torch.cat([raw & 15, raw >> 4], -1)
        case "pairs":
            return torch.stack([raw & 15, raw >> 4], -1).flatten(1)
        case "bits":
            return (raw[..., None] >> torch.arange(8, dtype=torch.uint8) & 1).flatten(1)
        case "quarters":
            return torch.cat([raw >> shift & 3 for shift in (0, 2, 4, 6)], -1)
        case "signed":
            return raw + 128  # int8's own bits, so that zero is in the middle; uint8 wraps around
    return raw


def _halves(numbers: dict[str, torch.Tensor], codes: torch.Tensor, format: Format) -> torch.Tensor:
    """Blocks of 64 as two of GGUF's blocks of 32 each."""
    d, m = (numbers[name].repeat_interleave(2, 0) for name in ("half", "least"))
    return write_small(d, m, codes.view(-1, _SMALL), format)
