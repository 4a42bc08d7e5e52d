"""k-quants: the bytes equal GGUF's, and the error is at most that of llama.cpp's own quantisation."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit.formats import KQUANT_BLOCKS, format_from_name
from lowbit.grid import PLAIN, Search, quantize, unpack
from lowbit.kquants import LAYOUTS, dequantize_kquant, quantize_kquant, read_blocks, write_blocks
from lowbit.packing import PackedTensor

NAMES = sorted(KQUANT_BLOCKS)
# sqrt(sum(m (w - w^)^2) / sum(m w^2)) of llama.cpp (the release in llama-cpp-python 0.3.36, its generic C code) on the
# weights of `anchor_weights`: normal, Student's t with 4 degrees of freedom, and normal with an importance matrix.
LLAMA_CPP_ERRORS = {
    "q2_k": (0.29610, 0.34755, 0.23983),
    "q3_k": (0.15149, 0.18361, 0.13542),
    "q4_k": (0.07147, 0.08742, 0.06506),
    "q5_k": (0.03627, 0.04427, 0.03319),
    "q6_k": (0.01780, 0.02294, 0.01632),
}


def official(packed: PackedTensor) -> np.ndarray:
    """GGUF's own reader on the same bytes."""
    kind = gguf.GGMLQuantizationType[packed.format.name.upper()]
    weight = gguf.quants.dequantize(packed.codes.numpy(), kind)
    return weight[..., : packed.shape[-1]]


def same_bits(a: torch.Tensor, b: np.ndarray) -> bool:
    return bool((a.contiguous().numpy().view(np.int32) == np.ascontiguousarray(b).view(np.int32)).all())


def random_blocks(name: str, rows: int, blocks: int, seed: int) -> PackedTensor:
    """Random bytes under factors of ordinary size and either sign."""
    format, random = format_from_name(name), np.random.default_rng(seed)
    data = random.integers(0, 256, (rows * blocks, KQUANT_BLOCKS[name].bytes), dtype=np.uint8)
    start = 0
    for piece in LAYOUTS[name].pieces:
        if piece.quantity in ("d", "dmin"):
            factors = random.normal(0, 1e-3, rows * blocks).astype(np.float16)
            data[:, start : start + 2] = factors.view(np.uint8).reshape(-1, 2)
        start += piece.size
    return PackedTensor(format, (rows, blocks * 256), torch.from_numpy(data.reshape(rows, -1)))


def anchor_weights() -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    random = np.random.default_rng(0)
    normal = (random.standard_normal((64, 1024)) * 0.02).astype(np.float32)
    importance = np.exp(random.standard_normal(1024)).astype(np.float32)
    heavy = (random.standard_t(4, (64, 1024)) * 0.02).astype(np.float32)
    weights = [torch.from_numpy(a) for a in (normal, heavy, normal)]
    return list(zip(weights, (None, None, torch.from_numpy(importance)), strict=True))


def relative_error(weight: torch.Tensor, restored: torch.Tensor, importance: torch.Tensor | None = None) -> float:
    m = torch.ones_like(weight) if importance is None else importance
    return float(((m * (weight - restored).square()).sum() / (m * weight.square()).sum()).sqrt())


def test_a_layout_fills_its_block() -> None:
    assert set(LAYOUTS) == set(KQUANT_BLOCKS)
    for name, layout in LAYOUTS.items():
        assert sum(piece.size for piece in layout.pieces) == KQUANT_BLOCKS[name].bytes
        bits = sum(p.size * 8 for p in layout.pieces if p.quantity == "codes")
        assert bits == 256 * layout.bits == 256 * format_from_name(name).bits


@pytest.mark.parametrize("name", NAMES)
def test_random_bytes_read_as_gguf_reads_them(name: str) -> None:
    packed = random_blocks(name, 7, 3, seed=1)
    assert same_bits(dequantize_kquant(packed), official(packed))


@pytest.mark.parametrize("name", NAMES)
def test_write_is_the_inverse_of_read(name: str) -> None:
    data = random_blocks(name, 33, 1, seed=2).codes
    assert torch.equal(write_blocks(read_blocks(data, LAYOUTS[name]), LAYOUTS[name]), data)


@pytest.mark.parametrize("steps", [0, 8])
@pytest.mark.parametrize("name", NAMES)
def test_our_blocks_read_as_gguf_reads_them(name: str, steps: int) -> None:
    weight = torch.randn(5, 768, generator=torch.Generator().manual_seed(3)) * 0.05
    packed = quantize_kquant(weight, format_from_name(name), steps)
    assert packed.tensors().keys() == {"codes"}
    assert same_bits(dequantize_kquant(packed), official(packed))


@settings(max_examples=30)
@given(
    name=st.sampled_from(NAMES),
    experts=st.sampled_from([(), (2,), (2, 3)]),
    rows=st.integers(1, 5),
    columns=st.integers(1, 600),
    seed=st.integers(0, 99),
)
def test_any_shape(name: str, experts: tuple[int, ...], rows: int, columns: int, seed: int) -> None:
    weight = torch.randn(*experts, rows, columns, generator=torch.Generator().manual_seed(seed))
    packed = quantize_kquant(weight, format_from_name(name), steps=2)
    restored = dequantize_kquant(packed)
    assert restored.shape == weight.shape
    assert packed.codes.shape == (*experts, rows, -(-columns // 256) * KQUANT_BLOCKS[name].bytes)
    # The error of a row never reaches that of leaving the row away; 2 bits come nearest, with a third of it.
    assert relative_error(weight, restored) < 0.6


@pytest.mark.parametrize("name", NAMES)
def test_a_row_does_not_depend_on_its_neighbours(name: str) -> None:
    weight = torch.randn(9, 300, generator=torch.Generator().manual_seed(4))
    whole = quantize_kquant(weight, format_from_name(name), steps=4)
    alone = quantize_kquant(weight[4:5], format_from_name(name), steps=4)
    assert torch.equal(whole.codes[4:5], alone.codes)


@pytest.mark.parametrize("name", NAMES)
def test_error_is_at_most_that_of_llama_cpp(name: str) -> None:
    format = format_from_name(name)
    for (weight, importance), theirs in zip(anchor_weights(), LLAMA_CPP_ERRORS[name], strict=True):
        packed = quantize_kquant(weight, format, steps=32, importance=importance)
        assert relative_error(weight, dequantize_kquant(packed), importance) < theirs


@pytest.mark.parametrize("name", NAMES)
def test_search_and_importance_pay(name: str) -> None:
    format = format_from_name(name)
    weight, importance = anchor_weights()[2]
    assert importance is not None
    weight = weight[:16]
    plain, search, weighted = (
        unpack(quantize(weight, format, *options)) for options in ((PLAIN,), (Search(),), (Search(), importance))
    )
    assert relative_error(weight, search) < relative_error(weight, plain)
    assert relative_error(weight, weighted, importance) < relative_error(weight, search, importance)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [1e-7, 1e-5, 1.0, 1e4])
def test_weights_of_any_size_keep_their_codes(name: str, size: float) -> None:
    weight = torch.randn(4, 512, generator=torch.Generator().manual_seed(5)) * size
    restored = dequantize_kquant(quantize_kquant(weight, format_from_name(name), steps=8))
    assert torch.isfinite(restored).all()
    # fp16 factors end at 6e-8; below, few of the codes are left.
    limit = 0.9 if size < 1e-6 else 0.35
    assert relative_error(weight, restored) < limit


@pytest.mark.parametrize("name", NAMES)
def test_zeros_stay_zero(name: str) -> None:
    weight = torch.zeros(3, 512)
    weight[1] = torch.randn(512, generator=torch.Generator().manual_seed(6))
    weight[1, 256:288] = 0
    for steps in (0, 8):
        restored = unpack(quantize(weight, format_from_name(name), Search(steps=steps)))
        assert not restored[0].any() and not restored[2].any() and not restored[1, 256:288].any()


@pytest.mark.parametrize("name", NAMES)
def test_a_constant_row_comes_back(name: str) -> None:
    for value in (0.5, -0.5):
        restored = dequantize_kquant(quantize_kquant(torch.full((1, 256), value), format_from_name(name), steps=8))
        assert torch.allclose(restored, torch.full((1, 256), value), rtol=2e-3)


@pytest.mark.parametrize("name", NAMES)
def test_inputs_without_importance_are_free(name: str) -> None:
    importance = torch.ones(256)
    importance[::2] = 0
    weight = torch.randn(8, 256, generator=torch.Generator().manual_seed(7))
    packed = quantize_kquant(weight, format_from_name(name), 16, importance)
    blind = quantize_kquant(weight, format_from_name(name), 16)
    seen = slice(1, None, 2)
    error, blind_error = (relative_error(weight[:, seen], unpack(p)[:, seen]) for p in (packed, blind))
    assert error < blind_error


@pytest.mark.parametrize("name", NAMES)
def test_shards_are_slices(name: str) -> None:
    weight = torch.randn(2, 4, 1024, generator=torch.Generator().manual_seed(8))
    packed = quantize_kquant(weight, format_from_name(name))
    whole = unpack(packed, torch.bfloat16)
    for rank in range(2):
        assert torch.equal(unpack(packed.shard(0, rank, 2), torch.bfloat16), whole[:, 2 * rank : 2 * rank + 2])
        assert torch.equal(unpack(packed.shard(1, rank, 2), torch.bfloat16), whole[..., 512 * rank : 512 * rank + 512])
    assert torch.equal(unpack(packed.expert(1), torch.bfloat16), whole[1])
