"""The engine over low-bit weights, its caches, instruction sets and slots, and what it refuses."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from lowbit.core import calls
from lowbit.errors import KernelError, RecipeError
from lowbit.formats import as_format
from lowbit.grid import quantize, unpack
from lowbit.models.families import spec_from_config
from lowbit.models.spec import DecoderSpec
from lowbit.packing import PackedTensor
from lowbit.runtime.engine import Engine
from lowbit.runtime.weights import EngineWeights, engine_weights
from unit.family_cases import CASES, TOLERANCE, arrays, tiny_model
from unit.spec_interpreter import decoder_logits

CONTEXT = 160
# Relative to the norm of the logits. Keys and values in fp16 have 11 bits, in int8 with a scale per head and token 7.
CACHE_TOLERANCE = {"fp32": 1e-5, "fp16": 2e-3, "int8": 0.03}
INT8_TOLERANCE = 0.05  # activations of a tiny model rounded to int8, a layer after the other

Arrays = dict[str, NDArray[Any]]


def ids(count: int, seed: int = 3) -> list[int]:
    return np.random.default_rng(seed).integers(0, 131, count).tolist()


def spec_and_arrays(case: str = "llama", **changes: Any) -> tuple[DecoderSpec, Arrays]:
    model_type, fields = CASES[case]
    model = tiny_model(model_type, {**fields, "max_position_embeddings": 512, **changes})
    return spec_from_config(model.config.to_dict()), dict(arrays(model))


def relative(a: NDArray[Any], b: NDArray[Any]) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def as_numpy(packed: PackedTensor) -> PackedTensor:
    return packed.with_tensors({name: tensor.numpy() for name, tensor in packed.tensors().items()})


def low_bit(spec: DecoderSpec, tensors: Arrays, format: str) -> tuple[EngineWeights, Arrays]:
    """All linear weights packed, and the same weights dense again for the interpreter."""
    packed: dict[str, Any] = dict(tensors)
    dense = dict(tensors)
    for name, array in tensors.items():
        if array.ndim < 2 or "router" in name or ".gate.weight" in name:
            continue
        weight = quantize(torch.from_numpy(np.ascontiguousarray(array)), as_format(format))
        packed[name], dense[name] = as_numpy(weight), unpack(weight).numpy()
    return engine_weights(spec, packed), dense


@pytest.fixture
def llama() -> Iterator[Engine]:
    spec, tensors = spec_and_arrays()
    with Engine(spec, engine_weights(spec, tensors), CONTEXT, slots=3) as engine:
        yield engine


@pytest.mark.parametrize(
    "format",
    [
        "int4_g32",
        "int4_asym_g16",
        "int4_fine_g32",
        "int3_g32",
        "int8_channel",
        "nf4_g32",
        "mxfp4",
        "nf4_dq",
        "q4_k",
        "q6_k",
        "q5_1",
    ],
)
def test_packed_weights_give_the_logits_of_what_they_stand_for(format: str) -> None:
    """The embedding too: a tied head and the rows of the embedding are read from one prepared buffer."""
    spec, tensors = spec_and_arrays("llama")
    weights, dense = low_bit(spec, tensors, format)
    expected = decoder_logits(spec, dense, ids(40))
    with Engine(spec, weights, CONTEXT, cache="fp32", compute="fp32") as engine:
        assert np.abs(engine.logits(ids(40)) - expected).max() < TOLERANCE
    with Engine(spec, weights, CONTEXT) as engine:
        whole = engine.logits(ids(40))
        engine.reset()
        single = np.stack([engine.decode(token) for token in ids(40)])
        assert relative(whole, expected) < INT8_TOLERANCE
        assert relative(single, expected) < INT8_TOLERANCE


@pytest.mark.parametrize("case", ["mixtral", "qwen2_moe", "phi3", "bloom"])
def test_packed_experts_and_fused_projections(case: str) -> None:
    spec, tensors = spec_and_arrays(case)
    weights, dense = low_bit(spec, tensors, "int4_g32")
    expected = decoder_logits(spec, dense, ids(40))
    with Engine(spec, weights, CONTEXT, cache="fp32", compute="fp32") as engine:
        assert np.abs(engine.logits(ids(40)) - expected).max() < TOLERANCE
        engine.reset()
        pieces = np.concatenate([engine.logits(ids(40)[i : i + 9]) for i in range(0, 40, 9)])
        assert np.abs(pieces - expected).max() < TOLERANCE


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_plain_sixteen_bit_weights(dtype: str) -> None:
    spec, tensors = spec_and_arrays("qwen3")
    halves = {n: torch.from_numpy(np.ascontiguousarray(a)).to(getattr(torch, dtype)) for n, a in tensors.items()}
    rounded = {name: half.float().numpy() for name, half in halves.items()}
    weights = engine_weights(spec, rounded)
    for key, matrix in weights.matrices.items():
        half = torch.from_numpy(np.ascontiguousarray(matrix.owner)).to(getattr(torch, dtype)).view(torch.int16).numpy()
        weights.matrices[key] = replace(matrix, address=half.ctypes.data, dtype=dtype, owner=half)
    with Engine(spec, weights, CONTEXT, cache="fp32", compute="fp32") as engine:
        assert np.abs(engine.logits(ids(40)) - decoder_logits(spec, rounded, ids(40))).max() < TOLERANCE


@pytest.mark.parametrize("cache", CACHE_TOLERANCE)
@pytest.mark.parametrize("case", ["llama", "gemma2", "mpt", "gpt_oss"])
def test_cache_types(case: str, cache: str) -> None:
    spec, tensors = spec_and_arrays(case) if case != "mpt" else spec_and_arrays(case, max_seq_len=512)
    expected = decoder_logits(spec, tensors, ids(150))
    with Engine(spec, engine_weights(spec, tensors), CONTEXT, cache=cache, compute="fp32") as engine:
        assert relative(engine.logits(ids(150)), expected) < CACHE_TOLERANCE[cache]
        engine.reset()
        engine.prefill(ids(150)[:-12])  # long enough that the keys of one query are split over the threads
        last = np.stack([engine.decode(token) for token in ids(150)[-12:]])
        assert relative(last, expected[-12:]) < CACHE_TOLERANCE[cache]


@pytest.mark.parametrize(
    "name", ["portable", "avx2", "avx_vnni", "avx512_vnni", "avx512", "amx", "amx_emulated", "neon", "neon_i8mm"]
)
def test_instruction_sets_agree(name: str) -> None:
    spec, tensors = spec_and_arrays("gemma3")
    expected = decoder_logits(spec, tensors, ids(70))
    try:
        calls.set_instruction_set(name)
    except KernelError:
        pytest.skip(f"this processor has no {name}")
    try:
        for cache, tolerance in CACHE_TOLERANCE.items():
            with Engine(spec, engine_weights(spec, tensors), CONTEXT, cache=cache, compute="fp32") as engine:
                assert relative(engine.logits(ids(70)), expected) < tolerance
                engine.reset()
                assert relative(np.stack([engine.decode(token) for token in ids(70)]), expected) < tolerance
    finally:
        calls.set_instruction_set(None)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_any_number_of_threads(threads: int) -> None:
    """More threads than cores too; the number may change while an engine lives."""
    spec, tensors = spec_and_arrays("qwen2_moe")
    expected = decoder_logits(spec, tensors, ids(30))
    before = calls.threads()
    with Engine(spec, engine_weights(spec, tensors), CONTEXT, cache="fp32", compute="fp32") as engine:
        calls.set_threads(threads)
        try:
            assert np.abs(engine.logits(ids(30)) - expected).max() < TOLERANCE
            engine.reset()
            assert np.abs(np.stack([engine.decode(token) for token in ids(30)]) - expected).max() < TOLERANCE
        finally:
            calls.set_threads(before)


def test_a_step_may_mix_chunks_and_single_tokens(llama: Engine) -> None:
    alone = [llama.logits(ids(9, seed), slot)[-4:] for slot, seed in ((0, 1), (1, 2), (2, 3))]
    for slot in range(3):
        llama.reset(slot)
    llama.prefill(ids(9, 1)[:5], slot=0)
    llama.prefill(ids(9, 3)[:8], slot=2)
    mixed = llama.step([*ids(9, 1)[5:], *ids(9, 2), ids(9, 3)[8]], [0] * 4 + [1] * 9 + [2])
    assert relative(mixed[:4], alone[0]) < 1e-3
    assert relative(mixed[9:13], alone[1]) < 1e-3
    assert relative(mixed[13], alone[2][-1]) < 1e-3


def test_generate_is_the_most_likely_token_again_and_again(llama: Engine) -> None:
    made = llama.generate(ids(12), 20)
    llama.reset()
    logits, by_hand = llama.prefill(ids(12)), []
    for _ in range(20):
        by_hand.append(int(logits.argmax()))
        logits = llama.decode(by_hand[-1])
    assert made == by_hand
    llama.reset()
    assert llama.generate(ids(12), 20, stops=[made[7]]) == made[: made.index(made[7]) + 1]


def test_truncate_takes_tokens_back(llama: Engine) -> None:
    expected = llama.logits(ids(20))[-1]
    llama.truncate(0, 11)
    assert llama.length() == 11
    llama.prefill([5, 6, 7])
    llama.truncate(0, 11)
    assert relative(llama.prefill(ids(20)[11:]), expected) < 1e-3


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda e: e.prefill([]), "prompt is empty"),
        (lambda e: e.prefill([1, 131]), "token 131 is outside the vocabulary of 131"),
        (lambda e: e.decode(-1), "token -1 is outside"),
        (lambda e: e.decode(2**40), "outside the vocabulary"),
        (lambda e: e.prefill(ids(CONTEXT + 1)), f"do not fit the context of {CONTEXT}"),
        (lambda e: e.generate(ids(CONTEXT - 3), 9), "do not fit slot 0"),
        (lambda e: e.decode(1, slot=3), "slot 3 does not exist"),
        (lambda e: e.step([1, 2, 3], [0, 1, 0]), "do not follow one another"),
        (lambda e: e.step([1, 2], [0]), "name the slot of each token"),
        (lambda e: e.truncate(0, 1), "holds 0 tokens"),
        (lambda e: e.length(7), "slot 7 does not exist"),
    ],
)
def test_refusals(llama: Engine, call: Any, sentence: str) -> None:
    with pytest.raises(RecipeError, match=sentence):
        call(llama)
    llama.reset()
    assert np.isfinite(llama.prefill(ids(4))).all()


def test_weights_that_disagree_with_the_spec() -> None:
    spec, tensors = spec_and_arrays()
    weights = engine_weights(spec, tensors)
    key = ("o", 1)
    good = weights.matrices.pop(key)
    with pytest.raises(RecipeError, match="layer 1 has no o weight"):
        Engine(spec, weights, CONTEXT)
    weights.matrices[key] = type(good)(good.address, good.rows - 1, good.cols, owner=good.owner)
    with pytest.raises(RecipeError, match="the o weight of layer 1 is"):
        Engine(spec, weights, CONTEXT)
    weights.matrices[key] = good
    with pytest.raises(RecipeError, match="no cache is of type 'fp8'"):
        Engine(spec, weights, CONTEXT, cache="fp8")
    with pytest.raises(RecipeError, match=r"a context of .* would fit"):
        Engine(spec, weights, 1 << 24, cache="fp32", slots=4096)


def test_a_closed_engine_says_so(llama: Engine) -> None:
    llama.close()
    with pytest.raises(KernelError, match="was closed"):
        llama.decode(1)


def test_profile_counts_few_barriers(llama: Engine) -> None:
    llama.prefill(ids(20))
    llama.profile(True)
    llama.decode(3)
    counted = llama.profile(False)
    assert counted["steps"] == 1
    assert counted["barrier_count"] <= 5 * len(llama.spec.layers) + 1
    assert counted["mlp"] > 0
