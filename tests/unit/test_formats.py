"""Formats: a name, its fields and the saved configuration are three spellings of one thing."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
from statistics import NormalDist

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowbit.errors import FormatError
from lowbit.formats import (
    ALIASES,
    FINE_BITS,
    FORMATS,
    IQ_TYPES,
    LEVELS,
    MIXED,
    MIXTURES,
    PER_CHANNEL,
    PER_TENSOR,
    SCALE_BITS,
    Format,
    as_format,
    format_from_name,
)
from lowbit.recipe import recipe_named

# The sixteen values that bitsandbytes publishes for nf4, in the order of the codes.
PUBLISHED_NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip
FREE = [f for f in FORMATS.values() if f.kind != "kquant" and SCALE_BITS[f.scale_dtype] > 8]


GROUP_SIZES = [1, 16, 32, 64, 100, 128, 4096]


@st.composite
def built_formats(draw: st.DrawFn, whole: tuple[int, ...] = (PER_CHANNEL, PER_TENSOR)) -> Format:
    """A format with every field drawn that its base leaves free; `whole` are the groups of no size of their own."""
    base = draw(st.sampled_from(FREE))
    changes = {
        "group_size": draw(st.sampled_from([*whole, *GROUP_SIZES])),
        "scale_dtype": draw(st.sampled_from(["float16", "bfloat16", "float32"])),
        "scale_block": draw(st.sampled_from([0, 256])),
        "symmetric": draw(st.booleans()) if base.kind == "int" else True,
    }
    changes["fine_zeros"] = not changes["symmetric"] and base.bits in FINE_BITS and draw(st.booleans())
    return base.replace(**changes)


@pytest.mark.parametrize("name", FORMATS)
def test_a_base_name_spells_its_fields(name: str) -> None:
    format = format_from_name(name)
    assert format is as_format(format) and format == FORMATS[name] == as_format(name) and str(format) == name
    assert Format.from_dict(format.to_dict()) == format


@pytest.mark.parametrize("alias", ALIASES)
def test_an_alias_resolves_to_a_name_that_spells_its_fields(alias: str) -> None:
    format = format_from_name(alias)
    assert format_from_name(format.name) == format
    assert format_from_name(f" {alias.upper()} ") == format


@given(built_formats())
def test_name_to_fields_to_name(format: Format) -> None:
    read = format_from_name(format.name)
    assert read == format and hash(read) == hash(format) and read.name == format.name
    assert Format.from_dict(format.to_dict()) == format


@given(built_formats(whole=()), st.integers(0, 20000))
def test_stored_size_of_a_wide_row(format: Format, beyond: int) -> None:
    in_features = 32 * format.group_size + beyond
    groups = format.groups(in_features)
    assert (groups - 1) * format.group_size < in_features <= groups * format.group_size
    assert (format.code_words(in_features) - 1) * 32 < in_features * format.bits <= format.code_words(in_features) * 32
    second_level = 32 / 256 if format.scale_block else 0
    scale = 8 + second_level if format.scale_block else SCALE_BITS[format.scale_dtype]
    stored = in_features * format.bits + groups * (scale + (0 if format.symmetric else 8))
    assert stored / in_features == pytest.approx(format.bits_per_weight, rel=0.04)


@pytest.mark.parametrize(
    ("name", "bits"),
    [("int4", 4.25), ("int4_asym_g32", 4.75), ("int4_fine_g32", 4.75),
     ("nf4_dq", 4.127), ("mxfp4", 4.25), ("nvfp4", 4.5), ("q4_k", 4.5),
     ("q6_k", 6.5625), ("q2_k", 2.625), ("int8_channel", 8.0)],
)  # fmt: skip
def test_known_sizes(name: str, bits: float) -> None:
    assert format_from_name(name).bits_per_weight == pytest.approx(bits, abs=1e-3)


@pytest.mark.parametrize(
    ("name", "close"),
    [("int44", "int4"), ("nf5", "nf4"), ("fp8_e4m2", "fp8_e4m3"), ("q4k", "q4_k"), ("symint4", "sym_int4")],
)
def test_an_unknown_name_lists_the_nearest(name: str, close: str) -> None:
    with pytest.raises(FormatError, match=rf"did you mean .*\b{close}\b"):
        format_from_name(name)


def test_fine_zeros_use_all_of_their_byte() -> None:
    for bits in FINE_BITS:
        format = format_from_name(f"int{bits}_fine_g32")
        assert not format.symmetric and format.fine_zeros and format.zero_step * 256 == 2**bits
        assert format.bits_per_weight == format_from_name(f"int{bits}_asym_g32").bits_per_weight
        assert format.max_zero == 2**bits - format.zero_step
    whole = format_from_name("int4_asym_g32")
    assert (whole.zero_step, whole.max_zero) == (1, 15)


def test_fine_zeros_follow_where_another_width_has_them() -> None:
    format = format_from_name("int4_fine_g32_bf16")
    assert format.with_bits(3).name == "int3_fine_g32_bf16" and format.with_bits(8).name == "int8_asym_g32_bf16"
    assert format_from_name("int4_g32").with_bits(2).name == "int2_g32"
    with pytest.raises(FormatError, match="take int6_asym"):
        format_from_name("int6_fine")


def test_fields_saved_before_there_were_fine_zeros_mean_whole_ones() -> None:
    fields = format_from_name("int4_asym_g32").to_dict()
    del fields["fine_zeros"]
    assert Format.from_dict(fields) == format_from_name("int4_asym_g32")


def test_a_name_like_no_other_lists_all() -> None:
    with pytest.raises(FormatError, match=r"known are .*int4.*q6_k"):
        format_from_name("%%%")


@pytest.mark.parametrize("name", IQ_TYPES)
def test_types_with_grids_of_their_own(name: str) -> None:
    """No format, but a recipe: of blocks that lowbit has, and a warning says how many bits those take."""
    with pytest.raises(FormatError, match=r"there is no format .*take q2_k"):
        format_from_name(name)
    with pytest.warns(
        UserWarning, match=f"{name} needs grids .* q2_k stands in for it, 2.6[23] bits .* of {IQ_TYPES[name]}"
    ):
        recipe = recipe_named(name)
    assert (recipe.linear.name, recipe.choose("model.layers.0.self_attn.v_proj", "linear").formats[0].name) == (
        "q2_k",
        "q4_k",
    )


@pytest.mark.parametrize(
    "name",
    ["int4_g0", "int9", "int1", "nf4_asym", "nf4_fine", "int6_fine",
     "int8_fine", "int4_asym_fine", "w8a8_fine", "q4_k_g32", "q4_k_fp32", "mxfp4_g16", "nvfp4_fp16", "mxfp4_dq",
     "int4_g64_g32", "int4_fp16_g32", "int4_", ""],
)  # fmt: skip
def test_names_that_contradict_themselves_are_refused(name: str) -> None:
    with pytest.raises(FormatError):
        format_from_name(name)


@pytest.mark.parametrize(
    ("name", "changes"),
    [("q4_k", {"group_size": 32}), ("nvfp4", {"group_size": 32}), ("q4_k", {"bits": 5}), ("fp8_e4m3", {"act_bits": 4}),
     ("fp8_e4m3", {"scale_dtype": "e8m0"}), ("int4", {"scale_dtype": "float8"}), ("int4", {"group_size": -2}),
     ("int4", {"kind": "ternary"}), ("nf4", {"table": "nf9"})],
)  # fmt: skip
def test_changes_that_no_name_spells_are_refused(name: str, changes: dict[str, object]) -> None:
    with pytest.raises(FormatError):
        format_from_name(name).replace(**changes)


def test_saved_fields_are_checked() -> None:
    fields = format_from_name("int4").to_dict()
    with pytest.raises(FormatError, match="unknown field colour"):
        Format.from_dict({**fields, "colour": "red"})
    with pytest.raises(FormatError, match="bits is missing"):
        Format.from_dict({"name": "int4"})


def test_with_group_renames() -> None:
    assert format_from_name("int4").with_group(32).name == "int4_g32"
    assert format_from_name("int4_asym_g32").with_group(64) == format_from_name("int4_asym")
    assert format_from_name("mxfp4").replace(scale_dtype="float16") == format_from_name("fp4_e2m1")


def test_formats_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        format_from_name("int4").bits = 3  # type: ignore[misc]


def test_mixtures_and_fallbacks_name_formats() -> None:
    for names in (*MIXED.values(), *MIXTURES.values()):
        assert all(format_from_name(name).name for name in names)
    for format in FORMATS.values():
        if format.block is not None:
            assert format_from_name(format.block.fallback).bits == format.bits


def normal_levels(bits: int) -> list[float]:
    """QLoRA's construction: evenly spaced quantiles on each side of an exact zero, one more above it."""
    count = 1 << bits
    outermost = 1 - (1 / (2 * count) + 1 / (2 * (count - 1))) / 2

    def side(points: int) -> list[float]:
        return [NormalDist().inv_cdf(outermost + (0.5 - outermost) * i / points) for i in range(points)]

    largest = max(side(count // 2))
    return sorted([-v / largest for v in side(count // 2 - 1)] + [0.0] + [v / largest for v in side(count // 2)])


def test_nf4_is_the_published_table() -> None:
    assert list(LEVELS["nf4"]) == PUBLISHED_NF4

    assert normal_levels(4) == pytest.approx(PUBLISHED_NF4, abs=2e-6)


def test_nf3_is_made_as_nf4_is() -> None:
    assert list(LEVELS["nf3"]) == normal_levels(3)


def test_bigdls_nf3_reaches_as_far_out_as_nf4() -> None:
    outermost = 0.9677083  # the end of NF4's construction
    below = [NormalDist().inv_cdf(outermost + (0.5 - outermost) * i / 3) for i in range(3)]
    assert LEVELS["nf3_bigdl"][:3] == pytest.approx([-value / below[0] for value in below], abs=1e-7)
    assert LEVELS["nf3_bigdl"][3:] == (0.0, *LEVELS["nf4"][9::2])


def test_fp4_is_the_published_table() -> None:
    positive = [0.0, 0.0052083333, 0.66666667, 1.0, 0.33333333, 0.5, 0.16666667, 0.25]
    assert LEVELS["fp4_bnb"] == pytest.approx([*positive, *(-v for v in positive)], abs=1e-8)
    assert LEVELS["e2m1"] == (0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6)
    assert max(LEVELS["e2m3"]) == 7.5 and max(LEVELS["e3m2"]) == 28.0


def test_every_table_has_a_level_for_each_code() -> None:
    for format in FORMATS.values():
        if format.kind in ("codebook", "float"):
            assert len(format.levels) == 1 << format.bits and 0.0 in format.levels
            assert format.max_level == max(abs(v) for v in format.levels if math.isfinite(v))


@pytest.mark.parametrize(("table", "dtype"), [("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)])
def test_fp8_levels_are_those_of_torch(table: str, dtype: torch.dtype) -> None:
    theirs = torch.arange(256).to(torch.uint8).view(dtype).float()
    ours = torch.tensor(LEVELS[table])
    # We hold no infinities: e5m2's two are not numbers here, because no weight may round to them.
    finite = torch.isfinite(theirs)
    assert torch.equal(ours[finite], theirs[finite]) and torch.isnan(ours[~finite]).all()


def test_formats_import_no_torch() -> None:
    code = "import sys; sys.modules['torch'] = None; from lowbit import formats, packing; print(len(formats.FORMATS))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == len(FORMATS)
