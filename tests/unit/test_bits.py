"""The dense bit stream, and PackedTensor cut into shards and experts: all inverse to packing, at any size."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit.bits import pack_codes, spread_groups, unpack_codes
from lowbit.errors import WeightError
from lowbit.formats import FORMATS, format_from_name
from lowbit.grid import quantize, unpack
from lowbit.packing import BUFFERS, PackedTensor, code_shape, scale_shape

WHOLE_FORMATS = [
    *FORMATS,
    "int4_asym",
    "int3_asym_g32",
    "int4_fine_g32",
    "int5_channel",
    "int4_asym_tensor",
    "fp8_e4m3_tensor_fp32",
]
LEADING = st.sampled_from([(), (1,), (3,), (2, 3), (2, 2, 3)])


def random_codes(shape: tuple[int, ...], bits: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 1 << bits, shape, generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


def random_weight(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@settings(max_examples=100)
@given(bits=st.integers(1, 8), leading=LEADING, count=st.integers(1, 200), seed=st.integers(0, 9))
def test_unpack_is_the_inverse_of_pack(bits: int, leading: tuple[int, ...], count: int, seed: int) -> None:
    codes = random_codes((*leading, count), bits, seed)
    words = pack_codes(codes, bits)
    assert words.dtype == torch.int32 and words.shape == (*leading, -(-count * bits // 32))
    assert torch.equal(unpack_codes(words, bits, count), codes)


@pytest.mark.parametrize("bits", range(1, 9))
def test_the_stream_is_little_endian_and_dense(bits: int) -> None:
    codes = random_codes((5, 77), bits)
    low_bits_first = (codes.numpy()[..., None] >> np.arange(bits, dtype=np.uint8)) & 1
    stream = low_bits_first.reshape(5, -1)
    stream = np.pad(stream, ((0, 0), (0, -stream.shape[1] % 32)))
    expected = np.packbits(stream, axis=1, bitorder="little").view("<i4")
    assert np.array_equal(pack_codes(codes, bits).numpy(), expected)


def test_rows_that_are_packed_in_turns() -> None:
    codes = torch.randint(0, 8, (5, (1 << 19) + 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    words = pack_codes(codes, 3)
    assert all(torch.equal(words[i], pack_codes(codes[i], 3)) for i in range(5))


def test_the_sign_bit_of_a_word_is_an_ordinary_bit() -> None:
    words = pack_codes(torch.full((1, 8), 15, dtype=torch.uint8), 4)
    assert words.tolist() == [[-1]]
    assert unpack_codes(words, 4, 8).unique().tolist() == [15]


def test_spread_groups_repeats_each_scale_and_cuts_the_tail() -> None:
    scales = torch.tensor([[1.0, 2.0, 3.0]])
    assert spread_groups(scales, format_from_name("int4_g32"), 70).tolist() == [[1.0] * 32 + [2.0] * 32 + [3.0] * 6]
    assert spread_groups(scales[:, :1], format_from_name("int4_channel"), 70).expand(1, 70).tolist() == [[1.0] * 70]


@pytest.mark.parametrize("name", WHOLE_FORMATS)
def test_buffers_have_the_shapes_that_the_format_says(name: str) -> None:
    format, shape = format_from_name(name), (3, 6, 300)
    packed = quantize(random_weight(*shape), format)
    assert packed.shape == shape and packed.codes.shape == code_shape(format, shape)
    if format.kind != "kquant":
        assert packed.scales.shape == scale_shape(format, shape)
        assert (packed.zeros is None) == format.symmetric
    assert list(packed.tensors()) == [name for name in BUFFERS if getattr(packed, name) is not None]
    assert packed.nbytes == sum(t.numel() * t.element_size() for t in packed.tensors().values())
    assert torch.equal(unpack(packed.with_tensors(packed.tensors())), unpack(packed))


def test_size_on_paper_is_size_in_memory() -> None:
    for name in ("int4", "int3_asym_g32", "nf4_dq", "mxfp4", "q5_k"):
        format = format_from_name(name)
        packed = quantize(random_weight(64, 1024), format)
        assert packed.bits_per_weight == pytest.approx(format.bits_per_weight, abs=1e-2)


@pytest.mark.parametrize("name", WHOLE_FORMATS)
@pytest.mark.parametrize("leading", [(), (3,)])
def test_shards_of_outputs_are_slices(name: str, leading: tuple[int, ...]) -> None:
    packed = quantize(random_weight(*leading, 8, 300), format_from_name(name))
    whole = unpack(packed)
    for rank in range(4):
        assert torch.equal(unpack(packed.shard(0, rank, 4)), whole[..., 2 * rank : 2 * rank + 2, :])


@pytest.mark.parametrize("name", WHOLE_FORMATS)
@pytest.mark.parametrize("leading", [(), (3,)])
def test_shards_of_inputs_are_slices(name: str, leading: tuple[int, ...]) -> None:
    packed = quantize(random_weight(*leading, 6, 1024), format_from_name(name))
    whole = unpack(packed)
    for rank in range(4):
        assert torch.equal(unpack(packed.shard(1, rank, 4)), whole[..., 256 * rank : 256 * rank + 256])


@pytest.mark.parametrize("name", [*WHOLE_FORMATS, "nf4_dq"])
def test_an_expert_is_a_slice(name: str) -> None:
    packed = quantize(random_weight(3, 64, 512), format_from_name(name))
    for index in range(3):
        assert torch.equal(unpack(packed.expert(index)), unpack(packed)[index])


@pytest.mark.parametrize(
    ("axis", "rank", "world", "says"),
    [(2, 0, 2, "the axis is 0"), (0, 2, 2, "rank 2 of 2"), (0, 0, 3, "8 outputs"), (1, 0, 2, "whole groups"),
     (1, 0, 7, "whole groups")],
)  # fmt: skip
def test_cuts_that_cannot_be_made_are_refused(axis: int, rank: int, world: int, says: str) -> None:
    packed = quantize(random_weight(8, 192), format_from_name("int4"))
    with pytest.raises(WeightError, match=says):
        packed.shard(axis, rank, world)


def test_layouts_that_cross_the_cut_are_refused() -> None:
    with pytest.raises(WeightError, match="without _dq"):
        quantize(random_weight(8, 128), format_from_name("nf4_dq")).shard(0, 0, 2)
    with pytest.raises(WeightError, match="no whole blocks of 256"):
        quantize(random_weight(2, 8, 128), format_from_name("nf4_dq")).expert(0)
    with pytest.raises(WeightError, match="no experts"):
        quantize(random_weight(8, 128), format_from_name("int4")).expert(0)
    packed = quantize(random_weight(8, 128), format_from_name("int4"))
    packed.order = torch.arange(128, dtype=torch.int32)
    with pytest.raises(WeightError, match="act-order"):
        packed.shard(1, 0, 2)


def test_order_puts_the_inputs_back() -> None:
    weight = random_weight(8, 128)
    order = torch.randperm(128, generator=torch.Generator().manual_seed(1))
    packed = quantize(weight[:, order].contiguous(), format_from_name("int8"))
    in_order = unpack(packed)
    packed.order = order.to(torch.int32)
    assert torch.equal(unpack(packed)[:, order], in_order)
    assert torch.allclose(unpack(packed), weight, atol=0.02)
    assert torch.equal(unpack(packed.shard(0, 1, 2)), unpack(packed)[4:])


def test_arrays_of_the_wrong_shape_are_refused() -> None:
    packed = quantize(random_weight(8, 128), format_from_name("int4"))
    with pytest.raises(WeightError, match="codes of a int4 weight"):
        PackedTensor(packed.format, (8, 120), packed.codes, packed.scales)
    with pytest.raises(WeightError, match="scales of a int4 weight"):
        PackedTensor(packed.format, (8, 128), packed.codes, packed.scales[:, :1])
