"""The packed weights of BigDL-LLM and ipex-llm, as their `save_low_bit` wrote them: bytes in, a PackedTensor out.

A weight [out, in] is one run of bytes, row after row, each row blocks of 64 weights (256 for the k-quants). A block is a few fields
one after another, numbers and runs of codes:

    half, float     d, the scale, in fp16 or fp32          least      m, the minimum, in fp16
    pairs           q4_k's scales and minima, by turns
    Codes           some bits of the codes: whose they are, each byte from its lowest bits up

Nothing is rounded: each type has a format of ours with the same numbers. One with a minimum becomes two of GGUF's blocks of 32
with the same d and m, because that minimum need not be a whole number of steps. q4_k keeps in bytes the integers for which GGUF
has 6 bits; their values are the same.

The only public header (ipex-llm's patch of vLLM for GPUs) names the fields, not the order of bits inside them; and folders hold
the order of CPUs. That one was seen: ipex-llm 2.2.0's library packed known numbers, BigDL-LLM 2.4.0's gives the same bytes for
them, but for fp8_e4m3 (`_SMALLEST_HALVED`), and the tests keep some of those bytes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from lowbit.bits import pack_codes
from lowbit.errors import CheckpointError
from lowbit.formats import Format, format_from_name
from lowbit.kquants import LAYOUTS, Blocks, write_blocks
from lowbit.packing import PackedTensor
from lowbit.small_blocks import write_small

_BLOCK = 64
_SMALL = 32
_NUMBERS = {"half": 2, "least": 2, "float": 4, "pairs": 16}


@dataclass(frozen=True)
class Codes:
    """Some bits of every code of a block: `order` says whose they are, and `place` where they stand in the code."""

    bits: int
    order: tuple[int, ...]
    place: int = 0

    @property
    def bytes(self) -> int:
        return len(self.order) * self.bits // 8


@dataclass(frozen=True)
class OldType:
    """One of their types: our format with the same numbers, and the fields of a block in their order. The scales are `unit` times
    what stands there."""

    format: str
    fields: tuple[str | Codes, ...] = ()
    unit: float = 1.0

    @property
    def weights(self) -> int:
        block = format_from_name(self.format).block
        if not self.fields and block is not None:
            return block.weights
        return max(len(field.order) for field in self.fields if isinstance(field, Codes))

    @property
    def bytes(self) -> int:
        block = format_from_name(self.format).block
        if not self.fields and block is not None:
            return block.bytes
        return sum(_NUMBERS[field] if isinstance(field, str) else field.bytes for field in self.fields)

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """How many bytes a weight takes; 0 where its rows are no whole blocks, which was never packed."""
        return 0 if shape[-1] % self.weights else math.prod(shape) // self.weights * self.bytes


def _halves(weights: int, run: int) -> tuple[int, ...]:
    """Nibbles: byte i of a run has weight i low and weight i + run high."""
    return tuple(w for start in range(0, weights, 2 * run) for i in range(start, start + run) for w in (i, i + run))


_ALL = tuple(range(_BLOCK))
_NIBBLES = Codes(4, _halves(_BLOCK, 32))
_FIFTH_BITS = Codes(1, _ALL, place=4)
# nf4 has its halves the other way round.
_CROSSED = Codes(4, tuple((i + 32) % _BLOCK for i in _NIBBLES.order))
# Four weights in a byte, the first highest; their third bits lie in order.
_QUARTERS = Codes(2, tuple(i ^ 3 for i in _ALL))
_THIRD_BITS = Codes(1, _ALL, place=2)
# fp6 shuffles eight weights among four bytes of low nibbles, and sixteen among four bytes of high pairs.
_SHUFFLE = (2, 0, 3, 1)
_LOW_FOUR = Codes(4, tuple(g + i + k for g in range(0, _BLOCK, 8) for i in _SHUFFLE for k in (4, 0)))
_HIGH_TWO = Codes(2, tuple(g + i + k for g in range(0, _BLOCK, 16) for i in _SHUFFLE for k in (12, 8, 4, 0)), place=4)
_WHOLE = Codes(8, _ALL)
_FOUR_BITS = ("half", _NIBBLES)
# Their GPUs move a small float's bits into those of fp16, whose exponent starts lower: what is meant is so much less.
_E3M2_IN_HALF, _E4M3_IN_HALF = 2.0**-12, 2.0**-8
# ipex-llm's fp8_e4m3 counts on that, with a scale of max|w| / 1.75; BigDL-LLM's had one of max|w| / 448. A scale from here on
# would mean weights of 1.75 and more in BigDL-LLM, one below it weights under 0.007 in ipex-llm.
_SMALLEST_HALVED = 2.0**-8
OLD_TYPES: dict[str, OldType] = {
    "sym_int4": OldType("int4", _FOUR_BITS),
    "woq_int4": OldType("int4", _FOUR_BITS),
    "asym_int4": OldType("q4_1", ("half", "least", _NIBBLES)),
    "sym_int5": OldType("int5", ("half", _FIFTH_BITS, _NIBBLES)),
    "asym_int5": OldType("q5_1", ("half", "least", _FIFTH_BITS, _NIBBLES)),
    "sym_int8": OldType("int8_fp32", ("float", _WHOLE)),
    "nf4": OldType("nf4", ("half", _CROSSED)),
    "nf3": OldType("nf3_bigdl", ("half", _THIRD_BITS, _QUARTERS)),
    "fp4": OldType("fp4_e2m1_g64", _FOUR_BITS),
    "fp6": OldType("fp6_e3m2_fp32", (_LOW_FOUR, _HIGH_TWO, "half"), unit=_E3M2_IN_HALF),
    "fp8": OldType("fp8_e5m2_fp32", ("float", _WHOLE)),
    "fp8_e5m2": OldType("fp8_e5m2_fp32", ("float", _WHOLE)),
    "fp8_e4m3": OldType("fp8_e4m3_fp32", ("float", _WHOLE)),
    "q2_k": OldType("q2_k"),
    "q4_k": OldType("q4_k", ("half", "least", "pairs", Codes(4, _halves(256, 16)))),
    "q5_k": OldType("q5_k"),
    "q6_k": OldType("q6_k"),
}
# With another form that blocks of a type may have, by a name that no script knows.
FORMS = OLD_TYPES | {"q4_k_gguf": OldType("q4_k")}
_RTN = "it was made for NPUs, whose folders have another form"
UNREADABLE: dict[str, str] = {
    "mixed_fp4": "it does not say which layers are sym_int4 and which fp4",
    "mixed_fp8": "it does not say which layers are sym_int8 and which fp8_e4m3",
    "torch_fp8": "the scale of each weight was not saved with it",
    "torch_fp8_e5m2": "the scale of each weight was not saved with it",
    "torch_fp8_e4m3": "the scale of each weight was not saved with it",
    "fp6_k": "in which order its blocks hold the bits was never published",
    "gguf_iq1_s": "the iq types need grids that lowbit does not have",
    "gguf_iq1_m": "the iq types need grids that lowbit does not have",
    "gguf_iq2_xs": "the iq types need grids that lowbit does not have",
    "gguf_iq2_xxs": "the iq types need grids that lowbit does not have",
    "sym_int4_rtn": _RTN,
    "sym_int8_rtn": _RTN,
    "asym_int4_rtn": _RTN,
}


def read_blocks(name: str, data: torch.Tensor, old: str, shape: tuple[int, ...]) -> PackedTensor:
    """The weight `name` of a shape [out, in] from its bytes; `old` is one of `FORMS`."""
    kind = FORMS[old]
    flat = data.reshape(-1).contiguous().view(torch.uint8)
    if flat.numel() != kind.nbytes(shape):
        raise CheckpointError(
            f"{name} has {flat.numel()} bytes, and a {old} weight {list(shape)} takes {kind.nbytes(shape)}: "
            "the folder is damaged, or of another version of ipex-llm"
        )
    format = format_from_name(kind.format)
    if not kind.fields:
        return PackedTensor(format, shape, codes=flat.view(*shape[:-1], -1))
    codes, numbers = _split(flat.view(-1, kind.bytes), kind)
    if "pairs" in numbers:
        return PackedTensor(format, shape, codes=_super_blocks(name, numbers, codes, format).view(*shape[:-1], -1))
    if "least" in numbers:
        return PackedTensor(format, shape, codes=_small_blocks(numbers, codes, format).view(*shape[:-1], -1))
    if old == "sym_int8":
        codes = codes + 128  # int8's own bits, so that zero is in the middle; uint8 wraps around
    scale = numbers["float" if "float" in numbers else "half"]
    if kind.unit != 1:
        scale = scale.float() * kind.unit
    if old == "fp8_e4m3" and float(scale.abs().median()) >= _SMALLEST_HALVED:
        scale = scale * _E4M3_IN_HALF
    packed = pack_codes(codes.view(*shape[:-1], -1), format.bits)
    return PackedTensor(format, shape, codes=packed, scales=scale.reshape(*shape[:-1], -1))


def _split(blocks: torch.Tensor, kind: OldType) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Blocks [n, bytes] as the codes of their weights [n, weights], and their numbers by name."""
    codes = torch.zeros(len(blocks), kind.weights, dtype=torch.uint8)
    numbers: dict[str, torch.Tensor] = {}
    begin = 0
    for field in kind.fields:
        size = _NUMBERS[field] if isinstance(field, str) else field.bytes
        raw = blocks[:, begin : begin + size].contiguous()
        begin += size
        if isinstance(field, Codes):
            shifts = torch.arange(0, 8, field.bits, dtype=torch.uint8)
            values = (raw[..., None] >> shifts & ((1 << field.bits) - 1)).flatten(1)
            codes[:, list(field.order)] |= values << field.place
        else:
            numbers[field] = raw if field == "pairs" else raw.view(torch.float32 if field == "float" else torch.float16)
    return codes, numbers


def _small_blocks(numbers: dict[str, torch.Tensor], codes: torch.Tensor, format: Format) -> torch.Tensor:
    """Blocks of 64 as two of GGUF's blocks of 32 each."""
    d, m = (numbers[name].repeat_interleave(2, 0) for name in ("half", "least"))
    return write_small(d, m, codes.view(-1, _SMALL), format)


def _super_blocks(name: str, numbers: dict[str, torch.Tensor], codes: torch.Tensor, format: Format) -> torch.Tensor:
    """q4_k with bytes for scales and minima as GGUF's q4_k, which has 6 bits for them."""
    layout, pairs = LAYOUTS[format.name], numbers["pairs"]
    if int(pairs.max()) > layout.scale_high:
        raise CheckpointError(
            f"{name} has a scale of {int(pairs.max())} in a block of q4_k, which ends at {layout.scale_high}: "
            "the folder is damaged, or of another version of ipex-llm"
        )
    d, least = (numbers[field].float() for field in ("half", "least"))
    return write_blocks(Blocks(d, least, pairs[:, ::2].float(), pairs[:, 1::2].float(), codes), layout)
