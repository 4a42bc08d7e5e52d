"""compressed-tensors' form: what we write, its own package reads, and what it and its older versions wrote, we read."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit import Format, format_from_name
from lowbit.algorithms.rtn import round_weight
from lowbit.bits import unpack_codes
from lowbit.checkpoint import compressed
from lowbit.errors import CheckpointError
from lowbit.grid import unpack
from lowbit.schemes import format_of, scheme_of

NAMES = (
    "int2_g32",
    "int3_g32",
    "int4",
    "int4_asym_g32",
    "int5_asym_channel",
    "int6_channel",
    "int7_asym_g32",
    "int8",
    "int4_g32_bf16",
)


def packed_weight(format: Format, rows: int = 24, inputs: int = 128) -> torch.Tensor:
    return round_weight(torch.randn(rows, inputs, generator=torch.Generator().manual_seed(0)), format)


def scheme_for(format: Format) -> dict:
    config = compressed.config_for({"a": format}, None, [])
    return config["config_groups"]["group_0"]["weights"]


@pytest.mark.parametrize("name", NAMES)
def test_round_trip(name: str) -> None:
    packed = packed_weight(format_from_name(name))
    again = compressed.from_tensors("a", compressed.to_tensors(packed), packed.shape, scheme_for(packed.format))
    assert again.format == packed.format
    assert all(torch.equal(tensor, packed.tensors()[part]) for part, tensor in again.tensors().items())
    assert set(again.tensors()) == set(packed.tensors())


@pytest.mark.parametrize("name", NAMES)
def test_their_package_unpacks_ours(name: str) -> None:
    quantization = pytest.importorskip("compressed_tensors.quantization")
    from compressed_tensors.compressors import BaseCompressor

    packed = packed_weight(format_from_name(name))
    config = compressed.config_for({"a": packed.format}, None, [])
    scheme = quantization.QuantizationScheme(**config["config_groups"]["group_0"])
    tensors = compressed.to_tensors(packed)
    tensors["weight_scale"] = tensors["weight_scale"].float()
    theirs = BaseCompressor.get_value_from_registry("pack-quantized").decompress(tensors, scheme)["weight"]
    assert torch.equal(theirs, unpack(packed))


@given(bits=st.sampled_from([3, 5, 6, 7]), inputs=st.integers(1, 9).map(lambda n: n * 32))
@settings(max_examples=20)
def test_words_with_unused_bits_of_older_versions(bits: int, inputs: int) -> None:
    packed = packed_weight(format_from_name(f"int{bits}_g32"), 4, inputs)
    tensors = compressed.to_tensors(packed)
    per_word = 32 // bits
    codes = unpack_codes(packed.codes, bits, inputs).to(torch.int64)
    lanes = torch.nn.functional.pad(codes, (0, -inputs % per_word)).unflatten(-1, (-1, per_word))
    words = (lanes << (torch.arange(per_word) * bits)).sum(-1)
    loose = torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)
    if loose.shape[-1] == packed.codes.shape[-1]:
        return  # as wide as the dense stream, so the two cannot be told apart
    again = compressed.from_tensors("a", tensors | {"weight_packed": loose}, packed.shape, scheme_for(packed.format))
    assert torch.equal(again.codes, packed.codes)


def test_schemes_are_found_by_path_then_expression_then_class() -> None:
    def group(bits: int, *targets: str) -> dict:
        return {"targets": list(targets), "weights": {"num_bits": bits}}

    groups = {"a": group(4, "Linear"), "b": group(5, "re:.*head"), "c": group(8, "x.head")}
    config = {"config_groups": groups, "ignore": ["x.gate", "re:.*vision.*"]}

    def bits_of(path: str, *classes: str) -> int | None:
        scheme = scheme_of(path, classes, config)
        return scheme and scheme["num_bits"]

    assert bits_of("x.q_proj", "Linear", "Module") == 4
    assert bits_of("lm_head", "Linear") == 5
    assert bits_of("x.head", "Linear") == 8
    assert bits_of("x.embed", "Embedding") is None
    assert bits_of("x.gate", "Linear") is None
    assert bits_of("x.vision.q", "Linear") is None


def test_a_scheme_is_a_format_or_a_sentence() -> None:
    assert format_of("a", scheme_for(format_from_name("int4_asym_g32")), "bfloat16").name == "int4_asym_g32_bf16"
    for change in ({"type": "float"}, {"strategy": "block"}, {"strategy": None}):
        with pytest.raises(CheckpointError, match=r"a is packed as .*, and lowbit reads integers by group or channel"):
            format_of("a", scheme_for(format_from_name("int4")) | change, "float16")


@pytest.mark.parametrize(
    "change",
    [
        {"quantization_status": "initialized"},
        {"kv_cache_scheme": {"num_bits": 8}},
        {
            "format": "int-quantized",
            "config_groups": {"g": {"targets": ["Linear"], "weights": {"type": "int", "strategy": "group"}}},
        },
        {"config_groups": {"W4A16": ["Linear"]}},
    ],
)
def test_what_is_left_to_their_package(change: dict) -> None:
    config = compressed.config_for({"a": format_from_name("int4")}, None, [])
    assert compressed.unreadable(config) is None
    assert compressed.unreadable(config | change)
