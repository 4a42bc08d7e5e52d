"""The engine gives the logits of every family, however a sequence is cut into steps: the spec's interpreter is the truth."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import DynamicCache, PreTrainedModel

from lowbit.models.families import spec_from_config
from lowbit.models.past import name_of_past
from lowbit.models.spec import DecoderSpec
from lowbit.runtime.engine import Engine
from lowbit.runtime.weights import engine_weights
from unit.family_cases import CASES, TOLERANCE, arrays, prompt, reference_logits, tiny_model

Logits = NDArray[np.float32]
CONTEXT = 64


@pytest.fixture(params=CASES, ids=lambda name: name.replace(", ", "-").replace(" ", "_"))
def case(request: pytest.FixtureRequest) -> Iterator[tuple[DecoderSpec, Engine, NDArray[Any]]]:
    model_type, fields = CASES[request.param]
    model = tiny_model(model_type, fields, "sdpa" if fields.get("alibi") else "eager")
    spec = spec_from_config(model.config.to_dict())
    with Engine(spec, engine_weights(spec, arrays(model)), CONTEXT, cache="fp32", compute="fp32", slots=2) as engine:
        yield spec, engine, reference_logits(model)


def in_pieces(engine: Engine, ids: list[int], size: int) -> Logits:
    engine.reset()
    return np.concatenate([engine.logits(ids[i : i + size]) for i in range(0, len(ids), size)])


def test_logits_are_those_of_transformers(case: tuple[DecoderSpec, Engine, NDArray[Any]]) -> None:
    spec, engine, expected = case
    ids = prompt()
    assert np.abs(in_pieces(engine, ids, len(ids)) - expected).max() < TOLERANCE
    lasting = all(not rope.depends_on_length for rope in (layer.rope for layer in spec.layers) if rope is not None)
    for size in (1, 3, 7):
        pieces = in_pieces(engine, ids, size)
        if lasting:  # else keys that were cached earlier were turned by other frequencies
            assert np.abs(pieces - expected).max() < TOLERANCE


def logits_in_pieces(model: PreTrainedModel, ids: list[int], size: int) -> Logits:
    """Those of transformers, which keeps keys and values from one piece to the next."""
    model = copy.deepcopy(model)  # its frequencies remember the longest sequence
    past = {name_of_past(model.forward): DynamicCache(config=model.config)}
    with torch.inference_mode():
        pieces = [torch.tensor([ids[i : i + size]]) for i in range(0, len(ids), size)]
        found = [model(piece, **past, use_cache=True).logits[0] for piece in pieces]
    return torch.cat(found).numpy()


@pytest.mark.parametrize("name", ["llama, rope dynamic, past", "phi3, longrope long"])
def test_frequencies_that_depend_on_the_length(name: str) -> None:
    """Past the trained length a prompt is turned as a whole, in however many chunks; what comes later, as transformers does."""
    model_type, fields = CASES[name]
    model, ids = tiny_model(model_type, fields), prompt()
    spec = spec_from_config(model.config.to_dict())
    pieces = {size: logits_in_pieces(model, ids, size) for size in (1, 3, 7)}
    whole = reference_logits(model)
    with Engine(spec, engine_weights(spec, arrays(model)), CONTEXT, cache="fp32", compute="fp32") as engine:
        engine.chunk = 5
        for _ in range(2):
            assert np.abs(in_pieces(engine, ids, len(ids)) - whole).max() < TOLERANCE
            for size, expected in pieces.items():
                assert np.abs(expected - whole).max() > 100 * TOLERANCE
                assert np.abs(in_pieces(engine, ids, size) - expected).max() < TOLERANCE
        engine.reset()
        assert np.abs(engine.prefill(ids) - whole[-1]).max() < TOLERANCE


def test_slots_do_not_disturb_one_another(case: tuple[DecoderSpec, Engine, NDArray[Any]]) -> None:
    _, engine, _ = case
    ids = prompt()
    alone = [in_pieces(engine, ids, 1), in_pieces(engine, ids[::-1], 1)]
    engine.reset()
    engine.prefill(ids[:4], slot=0)  # joins earlier than the other
    for i in range(4, len(ids)):
        both = engine.step([ids[i], ids[::-1][i - 4]], [0, 1])
        assert np.abs(both[0] - alone[0][i]).max() < TOLERANCE
        assert np.abs(both[1] - alone[1][i - 4]).max() < TOLERANCE


@pytest.mark.parametrize("wanted", [(), (-1,), (2, 3, 8, -1)], ids=["none", "last", "some"])
def test_tokens_whose_logits_nobody_wants_leave_their_keys_alone(
    case: tuple[DecoderSpec, Engine, NDArray[Any]], wanted: tuple[int, ...]
) -> None:
    """The last layer ends for them there; what is wanted, and what comes later, is as if all had been."""
    _, engine, _ = case
    first, second = prompt(), prompt()[::-1]
    alone = [in_pieces(engine, ids, len(ids) - 1) for ids in (first, second)]
    engine.reset()
    tokens = [*first[:-1], *second[:-1]]
    places = [0] * (len(first) - 1) + [1] * (len(second) - 1)
    asked = np.zeros(len(tokens), np.uint8)
    asked[list(wanted)] = 1
    expected = np.concatenate([alone[0][:-1], alone[1][:-1]])[asked.astype(bool)]
    found = engine._step(np.array(tokens, np.int32), np.array(places, np.int32), asked)
    assert found.shape == expected.shape and (found.size == 0 or np.abs(found - expected).max() < TOLERANCE)
    after = engine.step([first[-1], second[-1]], [0, 1])
    assert np.abs(after - np.stack([alone[0][-1], alone[1][-1]])).max() < TOLERANCE
