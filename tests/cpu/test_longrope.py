"""Longrope has two tables of frequencies: a text that grows past the trained length is read anew with the other one, once.

transformers' Phi-3 drops its cache there, and these are to be its answers, however they are made.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers.generation.streamers import BaseStreamer

import lowbit
from lowbit.models.families import spec_from_config
from lowbit.models.past import name_of_past, past_of
from lowbit.runtime.engine import Engine
from lowbit.runtime.model import Model
from lowbit.runtime.weights import engine_weights
from unit.family_cases import CASES, arrays, tiny_model

TRAINED, CONTEXT, NEW = 12, 64, 14
SHORT, LONG = [3, 9, 4, 1, 5, 9, 2], list(range(2, 20))


@pytest.fixture(scope="module")
def model() -> Any:
    model = tiny_model(*CASES["phi3, longrope long"])
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = None
    return model


def in_the_runtime(model: Any) -> Model:
    spec = spec_from_config(model.config.to_dict())
    return Model(Engine(spec, engine_weights(spec, arrays(model)), CONTEXT, cache="fp32", compute="fp32", slots=4))


@pytest.fixture
def runtime(model: Any) -> Model:
    return in_the_runtime(model)


def theirs(model: Any, prompt: list[int], **asked: Any) -> list[int]:
    with torch.inference_mode():
        out = type(model).generate(model, torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False, **asked)
    return out[0, len(prompt) :].tolist()


def kept_keys(model: Any, prompt: list[int]) -> list[int]:
    """What an answer would be whose keys stayed as they were cached."""
    with torch.inference_mode():
        out, ids = model(torch.tensor([prompt]), use_cache=True), []
        for _ in range(NEW):
            ids.append(int(out.logits[0, -1].argmax()))
            out = model(torch.tensor([ids[-1:]]), **{name_of_past(model.forward): past_of(out)}, use_cache=True)
    return ids


def test_an_answer_across_the_trained_length_is_transformers(model: Any, runtime: Model) -> None:
    expected = theirs(model, SHORT)
    assert expected != kept_keys(model, SHORT)  # or this would show nothing
    settings: dict[str, Any] = {"max_new_tokens": NEW, "ignore_end": True}
    for extra in ({}, {"prompt_lookup_num_tokens": 4}, {"draft": in_the_runtime(model)}):
        runtime.forget()
        assert list(runtime.generate(SHORT, **settings, **extra).tokens) == expected


def test_beams_across_the_trained_length_are_transformers(model: Any, runtime: Model) -> None:
    expected = theirs(model, SHORT, num_beams=3)
    assert expected != theirs(model, SHORT)
    assert list(runtime.generate(SHORT, max_new_tokens=NEW, num_beams=3, ignore_end=True).tokens) == expected


def test_texts_may_grow_and_shrink_across_the_trained_length(model: Any, runtime: Model, tmp_path: Path) -> None:
    def answer(prompt: list[int], **extra: Any) -> list[int]:
        return list(runtime.generate(prompt, max_new_tokens=NEW, ignore_end=True, **extra).tokens)

    first = answer(SHORT)
    for prompt in ([*SHORT, *first, 7, 8], SHORT, LONG, LONG[:8], [*LONG, 3], [*LONG, 4, 4]):
        expected = theirs(model, prompt)
        assert answer(prompt) == expected
        assert answer(prompt, prompt_cache=tmp_path / "kept") == expected
        runtime.forget()
        assert answer(prompt, prompt_cache=tmp_path / "kept") == expected


def test_a_text_past_the_trained_length_is_not_read_twice(runtime: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    slot, prefill = runtime.slots[0], runtime.engine.prefill

    def count(ids: Any, number: int = 0) -> Any:
        read.append(len(ids))
        return prefill(ids, number)

    monkeypatch.setattr(runtime.engine, "prefill", count)
    slot.advance(np.asarray(LONG, np.int32))
    slot.advance(np.asarray([*LONG[:15], 1, 2, 3], np.int32))
    assert read == [len(LONG), 3]


class Heard(BaseStreamer):  # type: ignore[misc]
    def __init__(self) -> None:
        self.ids: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        self.ids += value.flatten().tolist()

    def end(self) -> None: ...


def test_generate_of_a_low_bit_model_is_transformers() -> None:
    model: Any = tiny_model(*CASES["phi3, longrope long"])
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = None
    lowbit.optimize_model(model, low_bit="int8_g32", compute="fp32")
    model.generate.cache = "fp32"
    expected, ids, heard = theirs(model, SHORT), torch.tensor([SHORT]), Heard()
    for extra in ({}, {"streamer": heard}, {"prompt_lookup_num_tokens": 3}):
        out = model.generate(ids, max_new_tokens=NEW, do_sample=False, **extra)
        assert model.generate.why_not is None and out[0, len(SHORT) :].tolist() == expected
    assert heard.ids == SHORT + expected
    beams = model.generate(ids, max_new_tokens=NEW, do_sample=False, num_beams=3)
    assert model.generate.why_not is None and beams[0, len(SHORT) :].tolist() == theirs(model, SHORT, num_beams=3)
    draws = model.generate(ids, max_new_tokens=NEW, do_sample=True, temperature=1e-3, num_return_sequences=2)
    assert model.generate.why_not is None and draws[:, len(SHORT) :].tolist() == [expected, expected]
