"""Sequences in the cache: copied from slot to slot, out to bytes and in again; windows alone; and NaN traced to its layer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from lowbit.errors import KernelError, RecipeError
from lowbit.models.families import spec_from_config
from lowbit.models.spec import DecoderSpec
from lowbit.runtime import abi
from lowbit.runtime.describe import Description
from lowbit.runtime.engine import Engine
from lowbit.runtime.weights import engine_weights
from unit.family_cases import CASES, TOLERANCE, arrays, tiny_model

LONG = 900  # tokens: beyond what a window of 7 keeps, which is 640 places with chunks of 512
Arrays = dict[str, NDArray[Any]]


def ids(count: int, seed: int = 3) -> list[int]:
    return np.random.default_rng(seed).integers(0, 131, count).tolist()


def model_of(case: str) -> Any:
    model_type, fields = CASES[case]
    return tiny_model(model_type, {**fields, "max_position_embeddings": 1024})


def parts(case: str) -> tuple[DecoderSpec, Arrays]:
    model = model_of(case)
    return spec_from_config(model.config.to_dict()), dict(arrays(model))


def engine_of(case: str, slots: int = 2, cache: str = "fp32", context: int = 1024) -> Engine:
    spec, tensors = parts(case)
    return Engine(spec, engine_weights(spec, tensors), context, cache=cache, slots=slots, compute="fp32")


def cache_bytes(spec: DecoderSpec, tensors: Arrays, context: int) -> int:
    options = abi.COptions(context, 1, abi.CACHE_TYPES.index("fp16"), 0, 16)
    described = Description(spec, engine_weights(spec, tensors))
    return int(abi.engine_library().lowbit_engine_bytes(described.model, options))


# --- copies ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize(("length", "common"), [(50, 0), (50, 37), (16, 16), (33, 31), (50, 50)])
def test_a_copy_goes_on_like_the_original(cache: str, length: int, common: int) -> None:
    with engine_of("llama", cache=cache) as engine:
        engine.prefill(ids(60), slot=0)
        engine.copy(0, 1, common)
        engine.prefill([5, 6, 7], slot=1)
        engine.copy(0, 1, length, common)
        assert engine.length(1) == length and engine.length(0) == 60
        engine.truncate(0, length)
        both = engine.step([9, 9], [0, 1])
        assert np.array_equal(both[0], both[1])


def test_a_copied_slot_is_free_of_the_original() -> None:
    with engine_of("gemma2") as engine:
        engine.prefill(ids(40), slot=0)
        engine.copy(0, 1, 40)
        alone = engine.logits(ids(9, 1), slot=0)
        engine.reset(0)
        engine.prefill(ids(70, 8), slot=0)
        assert np.abs(engine.logits(ids(9, 1), slot=1) - alone).max() < TOLERANCE


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda e: e.copy(0, 5, 4), "slot 5 does not exist"),
        (lambda e: e.copy(0, 1, 41), "slot 0 holds 40 tokens and cannot be copied to 41"),
        (lambda e: e.copy(0, 1, 30, 4), "slot 1 holds 0 tokens and cannot share 4"),
        (lambda e: e.save(0, 50), "cannot be saved to 50"),
        (lambda e: e.restore(e.save(0), 39), "is damaged, or that of another model"),
        (lambda e: e.restore(e.save(0)[:-1], 40), "is damaged, or that of another model"),
        (lambda e: e.restore(np.zeros(3, np.uint8), 40), "is damaged, or that of another model"),
        (lambda e: e.restore(e.save(0), 2000), "does not fit a context of 1024"),
    ],
)
def test_refusals(call: Any, sentence: str) -> None:
    with engine_of("llama") as engine:
        engine.prefill(ids(40))
        with pytest.raises(RecipeError, match=sentence):
            call(engine)
        engine.reset()
        assert np.isfinite(engine.prefill(ids(4))).all()


# --- as bytes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("case", ["llama", "gemma2", "mistral"])
def test_saved_slots_go_on_in_another_engine(case: str, cache: str) -> None:
    with engine_of(case, cache=cache) as engine, engine_of(case, cache=cache, slots=3, context=960) as other:
        engine.prefill(ids(LONG), slot=1)
        saved = engine.save(1)
        other.restore(saved, LONG, slot=2)
        assert other.length(2) == LONG
        assert np.array_equal(engine.decode(7, 1), other.decode(7, 2))


# --- sliding windows -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["mistral", "gemma2", "gemma3", "phi3", "starcoder2", "mixtral"])
def test_windows_beyond_their_length_equal_transformers(case: str) -> None:
    model = model_of(case)
    with torch.no_grad():
        expected = model(torch.tensor([ids(LONG)])).logits[0].numpy()
    spec = spec_from_config(model.config.to_dict())
    weights = engine_weights(spec, arrays(model))
    with Engine(spec, weights, LONG + 40, cache="fp32", compute="fp32") as engine:
        pieces = [engine.logits(ids(LONG)[i : i + 130]) for i in range(0, LONG - 120, 130)]
        single = np.stack([engine.decode(token) for token in ids(LONG)[LONG - 120 :]])
        assert np.abs(np.concatenate([*pieces, single]) - expected).max() < TOLERANCE


def test_a_window_keeps_only_itself() -> None:
    spec, tensors = parts("mistral")
    bounded = [cache_bytes(spec, tensors, context) for context in (256, 1 << 14, 1 << 18)]
    assert bounded[1] == bounded[2] <= 2 * bounded[0]
    spec, tensors = parts("gemma2")  # every second layer has a window
    some = [cache_bytes(spec, tensors, context) for context in (1 << 14, 1 << 18)]
    assert 15 < some[1] / some[0] < 16


def test_what_a_window_let_go_cannot_come_back() -> None:
    with engine_of("mistral") as engine:
        expected = engine.logits(ids(LONG), slot=1)[-40:]
        engine.prefill(ids(LONG))
        shortest = engine.shortest()
        assert 400 < shortest < LONG - 40
        engine.truncate(0, LONG - 40)
        assert np.abs(engine.logits(ids(LONG)[-40:]) - expected).max() < TOLERANCE
        with pytest.raises(RecipeError, match=f"cannot be cut to {shortest - 1}, only to none or {shortest}"):
            engine.truncate(0, shortest - 1)
        engine.reset()
        assert engine.shortest() == 0 and engine.length() == 0
        assert np.isfinite(engine.prefill(ids(9))).all()


def test_slots_with_windows_are_copied_at_any_place() -> None:
    with engine_of("gemma3", slots=3) as engine:
        engine.prefill(ids(LONG), slot=0)
        engine.prefill(ids(LONG)[:30], slot=1)
        engine.copy(0, 1, LONG, 30)
        engine.copy(0, 2, LONG)
        engine.step([5, 6, 7], [0, 1, 2])
        engine.copy(0, 1, LONG + 1, LONG)  # alike but for the last token
        for token in ids(20, 9):
            rows = engine.step([token, token], [0, 1])
            assert np.abs(rows[0] - rows[1]).max() < TOLERANCE


# --- numbers that are none -------------------------------------------------------------------------------------------

DAMAGED = [
    ("embedding", None, "in the embedding"),
    ("v", 1, "in layer 1, in the query, key and value projections"),
    ("o", 2, "in layer 2, in the output projection of attention"),
    ("up", 0, "in layer 0, in the gate and up projections of the MLP"),
    ("down", 1, "in layer 1, in the down projection of the MLP"),
    ("head", None, "in the final norm or the head"),
]


@pytest.mark.parametrize(("role", "layer", "place"), DAMAGED)
def test_check_names_the_layer(role: str, layer: int | None, place: str) -> None:
    spec, tensors = parts("llama, biases, wide heads")
    weights = engine_weights(spec, tensors)
    damaged = weights.matrices[role, layer]
    damaged.owner[...] = damaged.owner.copy()
    damaged.owner.reshape(-1)[3::7] = np.inf if role == "o" else np.nan
    with Engine(spec, weights, 64, cache="fp32", compute="fp32") as engine:
        for count in (1, 20):
            with pytest.raises(KernelError, match="the logits are not numbers"):
                engine.prefill(ids(count))
            engine.check(True)
            with pytest.raises(KernelError, match=f"the first NaN or infinity appears {place}"):
                engine.prefill(ids(count))
            engine.check(False)
            assert engine.length() == 0


def test_check_finds_experts_and_leaves_good_models_alone() -> None:
    spec, tensors = parts("mixtral")
    weights = engine_weights(spec, tensors)
    with Engine(spec, weights, 64, cache="fp32", compute="fp32") as engine:
        engine.check(True)
        assert np.isfinite(engine.logits(ids(20))).all()
    weights.matrices["experts_down", 1].owner[...] = np.nan
    with Engine(spec, weights, 64, cache="fp32", compute="fp32") as engine:
        engine.check(True)
        with pytest.raises(KernelError, match="in layer 1, in the experts"):
            engine.prefill(ids(9))
