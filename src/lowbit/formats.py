"""Number formats: the one table of how a weight may be stored.

A weight row is cut into groups of `group_size` along the input axis, and each group keeps small codes and one scale:

    integer     w = scale * (code - zero)          zero = 2^(bits-1) when symmetric (the scale is then signed)
                                                   fine zeros count 2^bits / 256 of a code, others whole codes
    codebook    w = scale * levels[code]           levels is a short table: nf4, fp4, ...
    float       w = scale * levels[code]           the same arithmetic; the table is a small floating point type
    kquant      a block of 256 or 32 weights packed as GGUF packs it; scales live inside the block

A `Format` is a frozen value that checks itself, so that a name, its fields and the saved configuration are three
spellings of one thing: `format_from_name(f.name) == f` for every format. Names follow a grammar

    int4  int4_asym  int4_fine  int4_g32  int4_channel  int3_asym_g64_bf16  nf4_g64_dq  fp8_e4m3_tensor  w8a8  q4_k

so a new bit width, group or scale type needs no new row; only a new *kind of number* does.
Nothing here imports torch: the engine and the readers of containers use this table without it.
"""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Literal

from lowbit.errors import FormatError, nearest

Kind = Literal["int", "codebook", "float", "kquant"]
KINDS = ("int", "codebook", "float", "kquant")
PER_CHANNEL = -1
PER_TENSOR = 0
DEFAULT_GROUP = 64
# Second-level blocks of 256 scales, 8 bit each: what QLoRA uses, 0.127 bit per weight at groups of 64 instead of 0.25
# in fp16.
DOUBLE_QUANT_BLOCK = 256
# A zero point has a byte. From 6 bits on a quarter of a code step is all that its fraction could say.
ZERO_COUNTS = 256
FINE_BITS = (2, 3, 4, 5)
SCALE_BITS = {"float16": 16, "bfloat16": 16, "float32": 32, "e8m0": 8, "e4m3": 8}


@dataclass(frozen=True)
class Format:
    """One way to store a weight. Frozen, hashable, checks itself."""

    name: str
    bits: int
    kind: Kind = "int"
    symmetric: bool = True
    group_size: int = DEFAULT_GROUP
    scale_dtype: str = "float16"
    scale_block: int = 0
    table: str = ""
    act_bits: int = 16
    # Activations are rounded to one range of their layer, which calibration finds, and not each row to its own.
    fixed_range: bool = False
    # Zero points are counted in fractions of a code, so that the whole of their byte is used.
    fine_zeros: bool = False

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise FormatError(f"format {self.name}: kind is {self.kind!r}, expected one of {', '.join(KINDS)}")
        if not 2 <= self.bits <= 8:
            raise FormatError(f"format {self.name}: {self.bits} bits; lowbit stores 2 to 8")
        if self.group_size < PER_CHANNEL:
            raise FormatError(
                f"format {self.name}: group size {self.group_size}; use a positive size, or {PER_CHANNEL} per channel"
            )
        if self.scale_dtype not in SCALE_BITS:
            raise FormatError(
                f"format {self.name}: scale type {self.scale_dtype!r}, {nearest(self.scale_dtype, SCALE_BITS)}"
            )
        if self.kind in ("codebook", "float") and self.table not in LEVELS:
            raise FormatError(f"format {self.name}: no table of levels named {self.table!r}")
        if not self.symmetric and self.kind != "int":
            raise FormatError(f"format {self.name}: only integer formats can be asymmetric")
        if self.fine_zeros and (self.symmetric or self.bits not in FINE_BITS):
            raise FormatError(
                f"format {self.name}: zero points in fractions of a code belong to asymmetric integers of "
                f"{FINE_BITS[0]} to {FINE_BITS[-1]} bits; take int{self.bits}_asym or int4_fine"
            )
        if self.fixed_range and self.act_bits == 16:
            raise FormatError(f"format {self.name}: a fixed range is one of rounded activations, and it rounds none")
        if self.scale_block and SCALE_BITS[self.scale_dtype] == 8:
            raise FormatError(f"format {self.name}: its scales are 8 bit already and cannot be quantised again")

    @cached_property
    def levels(self) -> tuple[float, ...]:
        """The value of each code, for codebook and float kinds; empty for integers and k-quants."""
        return LEVELS[self.table] if self.table else ()

    @property
    def midpoint(self) -> int:
        """The zero point of a symmetric integer: the code that means 0."""
        return 1 << (self.bits - 1)

    @property
    def max_code(self) -> int:
        return (1 << self.bits) - 1

    @property
    def zero_step(self) -> float:
        """What one count of a stored zero point is worth in codes: 1, or 2^bits / 256 of fine ones."""
        return (1 << self.bits) / ZERO_COUNTS if self.fine_zeros else 1.0

    @property
    def max_zero(self) -> float:
        """The largest zero point that can be stored, in codes."""
        return (ZERO_COUNTS - 1) * self.zero_step if self.fine_zeros else float(self.max_code)

    @property
    def max_level(self) -> float:
        """The largest magnitude that a code can stand for before the scale is applied."""
        return max(abs(v) for v in self.levels if math.isfinite(v)) if self.table else float(self.midpoint)

    @property
    def has_global_scale(self) -> bool:
        """nvfp4 keeps one fp32 factor per tensor beside its 8-bit float scales."""
        return self.scale_dtype == "e4m3"

    @property
    def block(self) -> KQuantBlock | None:
        return (KQUANT_BLOCKS | SMALL_BLOCKS)[self.name] if self.kind == "kquant" else None

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight of a wide row, scales and zero points included."""
        if self.block is not None:
            return self.block.bytes * 8 / self.block.weights
        if self.group_size <= 0:
            return float(self.bits)
        scale = 8 + 32 / self.scale_block if self.scale_block else SCALE_BITS[self.scale_dtype]
        zero = 0 if self.symmetric or self.kind != "int" else 8
        return self.bits + (scale + zero) / self.group_size

    def groups(self, in_features: int) -> int:
        """How many groups a row of `in_features` weights has; the last one may be a shorter tail."""
        return 1 if self.group_size <= 0 else -(-in_features // self.group_size)

    def code_words(self, in_features: int) -> int:
        """How many 32-bit words hold the codes of one row."""
        return -(-in_features * self.bits // 32)

    def with_group(self, group_size: int) -> Format:
        """The same numbers with another group size."""
        return _rename(dataclasses.replace(self, group_size=group_size))

    def with_bits(self, bits: int) -> Format:
        """The same numbers in another width; zero points are whole where fine ones cannot be."""
        return self.replace(bits=bits, fine_zeros=self.fine_zeros and bits in FINE_BITS)

    def replace(self, **changes: Any) -> Format:
        """The same format with some fields changed, under the name that says so."""
        return _rename(dataclasses.replace(self, **changes))

    @property
    def unfixed(self) -> Format:
        """The same weights with a scale for each row of activations."""
        return self.replace(fixed_range=False) if self.fixed_range else self

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Format:
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = set(fields) - known
        if unknown:
            raise FormatError(f"format {fields.get('name', '?')}: unknown field {', '.join(sorted(unknown))}")
        missing = {"name", "bits"} - set(fields)
        if missing:
            raise FormatError(f"format {fields.get('name', '?')}: field {' and '.join(sorted(missing))} is missing")
        return cls(**fields)

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class KQuantBlock:
    """The size of one GGUF block, and what takes its place in rows that its weights do not divide evenly enough."""

    bytes: int
    weights: int = 256
    fallback: str = ""


KQUANT_BLOCKS = {
    "q2_k": KQuantBlock(84, fallback="int2_asym_g16"),
    "q3_k": KQuantBlock(110, fallback="int3_g16"),
    "q4_k": KQuantBlock(144, fallback="int4_asym_g32"),
    "q5_k": KQuantBlock(176, fallback="int5_asym_g32"),
    "q6_k": KQuantBlock(210, fallback="int6_g16"),
}
# GGUF's blocks of 32 with a minimum of their own; those without one are int4_g32, int5_g32 and int8_g32.
SMALL_BLOCKS = {
    "q4_1": KQuantBlock(20, 32, "int4_asym_g32"),
    "q5_1": KQuantBlock(24, 32, "int5_asym_g32"),
}


def _float_levels(exponent_bits: int, mantissa_bits: int, bias: int, largest: float = math.inf) -> tuple[float, ...]:
    """Every value of a small floating point type, in the order of its bit patterns; patterns above `largest` are not numbers."""
    positive = []
    for exponent in range(1 << exponent_bits):
        for mantissa in range(1 << mantissa_bits):
            fraction = mantissa / (1 << mantissa_bits)
            value = (fraction * 2.0 ** (1 - bias)) if exponent == 0 else ((1 + fraction) * 2.0 ** (exponent - bias))
            positive.append(value if value <= largest else math.nan)
    return tuple(positive) + tuple(-v for v in positive)


# Quantiles of a normal distribution with an exact zero and both ends at 1 (QLoRA, arXiv 2305.14314); fp32 values as
# bitsandbytes ships them, so that nf4 checkpoints convert code for code.
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
# QLoRA's construction for 3 bits: three quantiles below an exact zero and four above it.
_NF3 = (
    -1.0, -0.535022708485538, -0.24693143181157523, 0.0, 0.18333748033548755, 0.3819939543209139, 0.6229857417143424, 1.0,
)  # fmt: skip
# BigDL-LLM's 3 bits, which its old folders hold: quantiles as far out as those of 4 bits, so that the upper half is NF4's.
_NF3_BIGDL = (-1.0, -0.4786291718482971, -0.21714182198047638, 0.0, _NF4[9], _NF4[11], _NF4[13], 1.0)
# bitsandbytes' fp4: sign bit, then eight magnitudes in the order of their three-bit patterns.
_FP4_BNB_POSITIVE = (0.0, 0.0625 / 12, 8 / 12, 12 / 12, 4 / 12, 6 / 12, 2 / 12, 3 / 12)

LEVELS: dict[str, tuple[float, ...]] = {
    "nf4": _NF4,
    "nf3": _NF3,
    "nf3_bigdl": _NF3_BIGDL,
    "fp4_bnb": _FP4_BNB_POSITIVE + tuple(-v for v in _FP4_BNB_POSITIVE),
    "e2m1": _float_levels(2, 1, bias=1),
    "e2m3": _float_levels(2, 3, bias=1),
    "e3m2": _float_levels(3, 2, bias=3),
    "e4m3": _float_levels(4, 3, bias=7, largest=448.0),
    "e5m2": _float_levels(5, 2, bias=15, largest=57344.0),
}

_BASES: dict[str, Format] = {
    f.name: f
    for f in (
        *(Format(f"int{bits}", bits) for bits in range(2, 9)),
        Format("nf4", 4, "codebook", table="nf4"),
        Format("nf3", 3, "codebook", table="nf3"),
        Format("nf3_bigdl", 3, "codebook", table="nf3_bigdl"),
        Format("fp4", 4, "codebook", table="fp4_bnb"),
        Format("fp4_e2m1", 4, "float", table="e2m1", group_size=32),
        Format("fp6", 6, "float", table="e2m3"),
        Format("fp6_e3m2", 6, "float", table="e3m2"),
        Format("fp8_e4m3", 8, "float", table="e4m3"),
        Format("fp8_e5m2", 8, "float", table="e5m2"),
        Format("mxfp4", 4, "float", table="e2m1", group_size=32, scale_dtype="e8m0"),
        Format("nvfp4", 4, "float", table="e2m1", group_size=16, scale_dtype="e4m3"),
        Format("w8a8", 8, group_size=PER_CHANNEL, act_bits=8),
        Format("w8a8_static", 8, group_size=PER_CHANNEL, act_bits=8, fixed_range=True),
        *(Format(name, int(name[1]), "kquant", group_size=256) for name in KQUANT_BLOCKS),
        *(Format(name, int(name[1]), "kquant", group_size=32) for name in SMALL_BLOCKS),
    )
}

_SCALE_SUFFIX = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}
_SUFFIX = re.compile(
    r"(?:_(?P<zeros>asym|fine))?(?:_(?P<group>g\d+|channel|tensor))?(?:_(?P<scale>fp16|bf16|fp32))?(?:_(?P<double>dq))?$"
)

# What the five systems called these formats. `sym_int4` and its kin used groups of 64 (BigDL-LLM's ggml blocks).
ALIASES: dict[str, str] = {
    "sym_int4": "int4_g64",
    "asym_int4": "int4_asym_g64",
    "sym_int5": "int5_g64",
    "asym_int5": "int5_asym_g64",
    "sym_int8": "int8_g64",
    "woq_int4": "int4_g64",
    "sym_int4_rtn": "int4_channel",
    "sym_int8_rtn": "int8_channel",
    "asym_int4_rtn": "int4_asym_channel",
    "fp8": "fp8_e5m2",
    "fp6_k": "fp6_g16",
    "mixed_fp4": "fp4",
    "mixed_fp8": "fp8_e4m3",
    "torch_fp8": "fp8_e5m2_tensor_fp32",
    "torch_fp8_e5m2": "fp8_e5m2_tensor_fp32",
    "torch_fp8_e4m3": "fp8_e4m3_tensor_fp32",
    "int4_fullrange": "int4",
    "fp4_e2m1_bnb": "fp4",
    "q4_0": "int4_g32",
    "q5_0": "int5_g32",
    "q8_0": "int8_g32",
}
# Names that are a choice made layer by layer (the smaller error wins), not one format.
MIXED: dict[str, tuple[str, str]] = {"mixed_fp4": ("int4_g64", "fp4"), "mixed_fp8": ("int8_g64", "fp8_e4m3")}
# Names of plain dtypes: the model is cast, nothing is packed.
CASTS: dict[str, str] = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}
# A mixture over layers: the format of most layers, of the head, and of the layers that hurt most.
MIXTURES: dict[str, tuple[str, str, str]] = {
    "gguf_q4k_m": ("q4_k", "q6_k", "q6_k"),
    "gguf_q4k_s": ("q4_k", "q6_k", "q5_k"),
}
# llama.cpp's types below 3 bits, by the bits of a weight: their numbers come from grids that lowbit does not have.
_IQ_BITS = {"iq2_xxs": 2.06, "iq2_xs": 2.31, "iq1_s": 1.56, "iq1_m": 1.75}
IQ_TYPES: dict[str, float] = _IQ_BITS | {f"gguf_{name}": bits for name, bits in _IQ_BITS.items()}
# What stands in for them in a recipe: most layers, the head, the projections of values (which the old library raised as well).
IQ_STAND_IN = ("q2_k", "q6_k", "q4_k")


def _rename(format: Format) -> Format:
    """The format under the one name that its fields spell."""
    base = next((b for b in _BASES.values() if _same_numbers(b, format)), None)
    if base is None:
        raise FormatError(f"no format has the fields of {format!r}; start from one of {', '.join(_BASES)}")
    fixed = base.kind == "kquant" or SCALE_BITS[base.scale_dtype] == 8
    if fixed and dataclasses.replace(format, name=base.name) != base:
        raise FormatError(f"format {base.name} has a fixed layout; write just {base.name}")
    name = base.name
    if not format.symmetric:
        name += "_fine" if format.fine_zeros else "_asym"
    if format.group_size != base.group_size:
        name += {PER_CHANNEL: "_channel", PER_TENSOR: "_tensor"}.get(format.group_size, f"_g{format.group_size}")
    if format.scale_dtype != base.scale_dtype:
        name += "_" + _SCALE_SUFFIX[format.scale_dtype]
    if format.scale_block:
        name += "_dq"
    return dataclasses.replace(format, name=name)


def _same_numbers(base: Format, format: Format) -> bool:
    """Whether both store the same kind of number, whatever the group and scale."""
    eight_bit_scales = SCALE_BITS[base.scale_dtype] == 8
    return (base.bits, base.kind, base.table, base.act_bits, base.fixed_range) == (
        format.bits,
        format.kind,
        format.table,
        format.act_bits,
        format.fixed_range,
    ) and (
        eight_bit_scales == (SCALE_BITS[format.scale_dtype] == 8)
        and (not eight_bit_scales or base.scale_dtype == format.scale_dtype)
        and (base.kind != "kquant" or base.name == format.name)
    )


@lru_cache(maxsize=512)
def format_from_name(name: str) -> Format:
    """The format that a name spells: a base name with suffixes, or one of the old systems' names."""
    key = name.strip().lower()
    if key in IQ_TYPES:
        raise FormatError(
            f"there is no format {name}: the iq types need grids that lowbit does not have; take {IQ_STAND_IN[0]}"
        )
    key = ALIASES.get(key, key)
    base_name = max((b for b in _BASES if key == b or key.startswith(b + "_")), key=len, default="")
    match = _SUFFIX.fullmatch(key[len(base_name) :]) if base_name else None
    if match is None:
        known = [*_BASES, *ALIASES, *CASTS, *MIXTURES]
        raise FormatError(f"unknown format {name!r}: {nearest(key, known)}")
    return _with_suffix(_BASES[base_name], match)


def _with_suffix(base: Format, match: re.Match[str]) -> Format:
    changes: dict[str, Any] = {}
    if match["zeros"]:
        changes |= {"symmetric": False, "fine_zeros": match["zeros"] == "fine"}
    if match["group"]:
        sizes = {"channel": PER_CHANNEL, "tensor": PER_TENSOR}
        changes["group_size"] = sizes[match["group"]] if match["group"] in sizes else int(match["group"][1:])
    if match["scale"]:
        changes["scale_dtype"] = {short: long for long, short in _SCALE_SUFFIX.items()}[match["scale"]]
    if match["double"]:
        changes["scale_block"] = DOUBLE_QUANT_BLOCK
    if changes and (base.kind == "kquant" or SCALE_BITS[base.scale_dtype] == 8):
        raise FormatError(f"format {base.name} has a fixed layout and takes no suffix; write just {base.name}")
    if changes.get("group_size", 1) == 0 and match["group"] not in ("tensor",):
        raise FormatError(
            f"format {base.name}: a group must hold at least one weight; use {base.name}_channel for whole rows"
        )
    return _rename(dataclasses.replace(base, **changes))


def as_format(value: str | Format) -> Format:
    """A format given by value or by name."""
    return value if isinstance(value, Format) else format_from_name(value)


# The rows as users see them in `lowbit doctor` and the docs; every name here and every alias resolves.
FORMATS: dict[str, Format] = dict(_BASES)
