"""Guesses and clocks in `model.generate`: the same tokens as without them, and how many guesses were right."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from cpu.test_bridge import own_generate, packed_model
from lowbit.bridge import timed_generate
from lowbit.bridge.guessing import Draft
from lowbit.errors import LowbitError, RecipeError
from lowbit.runtime.speculate import Caution, DraftModel, PromptLookup
from lowbit_assets import tiny_model_in_memory

pytestmark = pytest.mark.transformers
# A text that repeats itself, so that looking back finds something.
IDS = torch.tensor([[5, 9, 11, 4, 8, 5, 9, 11, 4, 8, 5, 9, 11]])


@pytest.mark.parametrize("asked", [{"do_sample": False}, {"do_sample": True, "temperature": 0.8, "top_k": 10}], ids=str)
def test_looking_back_changes_no_token(asked: dict[str, Any]) -> None:
    model = packed_model()
    torch.manual_seed(3)
    plain = model.generate(IDS, max_new_tokens=24, **asked)
    torch.manual_seed(3)
    guessed = model.generate(IDS, max_new_tokens=24, prompt_lookup_num_tokens=4, max_matching_ngram_size=2, **asked)
    assert model.generate.why_not is None
    assert torch.equal(plain, guessed)
    assert 0 <= model.generate.guesser.matched <= model.generate.guesser.drafted > 0


def test_a_draft_of_the_same_weights_guesses_everything() -> None:
    model, small = packed_model(), packed_model()
    plain = model.generate(IDS, max_new_tokens=20, do_sample=False)
    assert torch.equal(model.generate(IDS, max_new_tokens=20, do_sample=False, assistant_model=small), plain)
    guesser = model.generate.guesser
    assert model.generate.why_not is None and guesser.matched == guesser.drafted >= 14


def test_a_draft_of_other_weights_costs_no_token() -> None:
    model, small = packed_model(), packed_model(low_bit="int3_g32")
    plain = model.generate(IDS, max_new_tokens=20, do_sample=False)
    draft = Draft(small, 8, Caution(least=0.5, guesses=2, adapts=True))
    assert torch.equal(model.generate(IDS, max_new_tokens=20, do_sample=False, draft=draft), plain)
    assert model.generate.why_not is None and model.generate.guesser.least != 0.5


def test_a_draft_that_the_engine_cannot_run_goes_to_transformers() -> None:
    model, small = packed_model(), tiny_model_in_memory("llama").eval()
    plain = own_generate(model, IDS, max_new_tokens=8, do_sample=False)
    out = model.generate(IDS, max_new_tokens=8, do_sample=False, draft=Draft(small, 3))
    assert "the model that guesses: it is not a low-bit model" in model.generate.why_not
    assert torch.equal(out, plain)


def test_a_batch_is_not_guessed_for() -> None:
    model = packed_model()
    with pytest.raises(ValueError, match="batch"):
        model.generate(IDS.expand(2, -1), max_new_tokens=4, do_sample=False, prompt_lookup_num_tokens=3)
    assert "one answer at a time" in model.generate.why_not


def test_the_clock_ticks_once_a_step_in_either_loop() -> None:
    model = packed_model()
    asked: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    plain = model.generate(IDS, **asked)
    for more in ({}, {"num_beams": 2}, {"return_dict_in_generate": True}):
        out, seconds = timed_generate(model, IDS, **asked, **more)
        assert len(seconds) == 6 and seconds == sorted(seconds) and seconds[0] > 0
        if not more:
            assert torch.equal(out, plain) and model.generate.why_not is None
    bare: Any = tiny_model_in_memory("llama").eval()
    assert len(timed_generate(bare, IDS, **asked)[1]) == 6


def test_a_guesser_counts_what_came_true() -> None:
    lookup = PromptLookup(3)
    tokens = np.array([7, 1, 2, 9, 3, 1, 2], np.int32)
    assert lookup(tokens, 3) == [9, 3, 1]
    assert lookup.settle(np.array([*tokens, 9, 4], np.int32)) == (1, 3)
    assert (lookup.drafted, lookup.matched) == (3, 1)
    assert lookup.settle(tokens) == (0, 0)


class _Sure:
    """A slot of an engine that is always sure of the next token to the same degree."""

    def __init__(self, probability: float) -> None:
        self.engine, self.probability = self, probability
        self.context, self.spec = 512, self
        self.vocab_size = 10

    def advance(self, tokens: np.ndarray) -> np.ndarray:
        rest = (1 - self.probability) / 9
        return np.log(np.where(np.arange(10) == 3, self.probability, rest)).astype(np.float32)


def test_a_draft_stops_when_it_is_not_sure_and_moves_its_bound() -> None:
    slot: Any = _Sure(0.6)
    draft = DraftModel(slot, 8, 10, Caution(least=0.7, guesses=3, adapts=True))
    tokens = np.array([1, 2], np.int32)
    assert draft(tokens, 8) == [3, 3, 3]
    draft.settle(np.array([1, 2, 5], np.int32))
    assert draft.least == pytest.approx(0.9 * 0.7 + 0.1 * 0.71)
    sure = DraftModel(slot, 8, 10, Caution(least=0.5, adapts=True, wanted=0.2))
    assert len(sure(tokens, 4)) == 4
    sure.settle(np.array([1, 2, 3, 3, 3, 3], np.int32))
    assert sure.least == pytest.approx(0.9 * 0.5 + 0.1 * 0.49)


def test_impossible_guesses_are_refused() -> None:
    with pytest.raises(RecipeError, match="from 1 up"):
        PromptLookup(0)
    with pytest.raises(RecipeError, match="share between 0 and 1"):
        Caution(least=1.5)
    with pytest.raises(LowbitError, match="same family"):
        DraftModel(_Sure(0.5), 3, 11)  # type: ignore[arg-type]
