"""Choosing tokens: the same distribution as transformers' own processors, and every refusal a sentence."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers.generation import logits_process as hf

from lowbit.errors import KernelError, RecipeError
from lowbit.runtime.selection import Selection, Selector

VOCAB = 500
RANDOM = np.random.default_rng(0)
LOGITS = (RANDOM.standard_normal(VOCAB) * 3).astype(np.float32)
HISTORY = np.array([3, 7, 7, 7, 250, 499, 3], np.int32)


def expected(selection: Selection) -> np.ndarray:
    """What transformers makes of the same settings."""
    steps: list[object] = []
    if selection.repetition_penalty != 1:
        steps.append(hf.RepetitionPenaltyLogitsProcessor(selection.repetition_penalty))
    if selection.temperature:
        steps.append(hf.TemperatureLogitsWarper(selection.temperature))
    if selection.top_k:
        steps.append(hf.TopKLogitsWarper(selection.top_k))
    if selection.top_p < 1:
        steps.append(hf.TopPLogitsWarper(selection.top_p))
    if selection.min_p:
        steps.append(hf.MinPLogitsWarper(selection.min_p))
    if selection.typical_p < 1:
        steps.append(hf.TypicalLogitsWarper(selection.typical_p))
    scores = torch.from_numpy(LOGITS.copy())[None]
    for step in steps:
        scores = step(torch.from_numpy(HISTORY.astype(np.int64))[None], scores)  # type: ignore[operator]
    return torch.softmax(scores[0].double(), -1).numpy()


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 1.0},
        {"temperature": 0.6, "top_k": 40},
        {"temperature": 1.3, "top_p": 0.9},
        {"temperature": 0.2, "top_p": 0.5},
        {"temperature": 1.0, "top_p": 0.999},
        {"temperature": 1.0, "min_p": 0.1},
        {"temperature": 1.5, "typical_p": 0.8},
        {"temperature": 0.9, "top_k": 60, "top_p": 0.8, "min_p": 0.02},
        {"temperature": 0.9, "top_k": 100, "typical_p": 0.5, "repetition_penalty": 1.4},
        {"temperature": 0.7, "top_k": 1},
    ],
    ids=str,
)
def test_distribution_equals_transformers(settings: dict[str, float]) -> None:
    selection = Selection(**settings)  # type: ignore[arg-type]
    probabilities = Selector(selection).probabilities(LOGITS, HISTORY)
    assert np.allclose(probabilities, expected(selection), atol=1e-6)


def test_draws_follow_the_distribution_and_the_seed() -> None:
    selection = Selection(temperature=1.0, top_k=8, seed=11)
    first, second = Selector(selection), Selector(selection)
    drawn = [first.choose(LOGITS, HISTORY) for _ in range(4000)]
    assert drawn[:200] == [second.choose(LOGITS, HISTORY) for _ in range(200)]
    probabilities = first.probabilities(LOGITS, HISTORY)
    shares = np.bincount(drawn, minlength=VOCAB) / len(drawn)
    assert np.abs(shares - probabilities).max() < 0.03
    assert set(drawn) <= set(np.flatnonzero(probabilities))


def test_greedy_takes_the_largest() -> None:
    assert Selector(Selection()).choose(LOGITS, HISTORY) == int(LOGITS.argmax())


def test_presence_and_frequency_penalties() -> None:
    selection = Selection(temperature=1.0, presence_penalty=0.5, frequency_penalty=0.25)
    moved = LOGITS.astype(np.float64)
    for token, count in zip(*np.unique(HISTORY, return_counts=True), strict=True):
        moved[token] -= 0.5 + 0.25 * count
    wanted = np.exp(moved - moved.max())
    assert np.allclose(Selector(selection).probabilities(LOGITS, HISTORY), wanted / wanted.sum(), atol=1e-6)


def test_biases_forbidden_words_and_minimum_length() -> None:
    best = int(LOGITS.argmax())
    second = int(LOGITS.argsort()[-2])
    assert Selector(Selection(bias={best: -np.inf})).choose(LOGITS, HISTORY) == second
    assert Selector(Selection(bias={9: 100.0})).choose(LOGITS, HISTORY) == 9
    assert Selector(Selection(forbidden=((3, best),))).choose(LOGITS, HISTORY) == second
    assert Selector(Selection(forbidden=((4, best),))).choose(LOGITS, HISTORY) == best
    selector = Selector(Selection(min_new_tokens=2), stop_tokens=(best,))
    assert [selector.choose(LOGITS, HISTORY) for _ in range(3)] == [second, second, best]


def test_generation_config() -> None:
    sampled = Selection.from_generation_config({"do_sample": True, "temperature": 0.3, "top_p": 0.9, "max_length": 20})
    assert (sampled.temperature, sampled.top_k, sampled.top_p) == (0.3, 50, 0.9)
    greedy = Selection.from_generation_config({"temperature": 0.3, "repetition_penalty": 1.1})
    assert (greedy.temperature, greedy.repetition_penalty) == (0.0, 1.1)


@pytest.mark.parametrize(
    "settings", [{"top_p": 0.0}, {"temperature": -1}, {"min_p": 2}, {"repetition_penalty": 0}, {"top_k": -1}], ids=str
)
def test_settings_out_of_range_say_what_is_allowed(settings: dict[str, float]) -> None:
    with pytest.raises(RecipeError, match="out of range; use"):
        Selection(**settings)  # type: ignore[arg-type]


def test_unusable_logits_and_tokens_are_refused() -> None:
    with pytest.raises(KernelError, match="NaN, infinite or all forbidden"):
        Selector(Selection()).choose(np.full(5, np.nan, np.float32), HISTORY[:0])
    with pytest.raises(KernelError, match="outside the vocabulary of 5"):
        Selector(Selection(repetition_penalty=2)).choose(np.zeros(5, np.float32), HISTORY)
    with pytest.raises(RecipeError, match="did you mean temperature"):
        Selection().replace(temprature=1)
