"""Choosing tokens: the same distribution as transformers' own processors, and every refusal a sentence."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from transformers.generation import logits_process as hf

from cpu.test_core import instruction_sets
from lowbit.core import calls
from lowbit.errors import KernelError, RecipeError
from lowbit.runtime.selection import Selection, Selector

VOCAB = 500
RANDOM = np.random.default_rng(0)
LOGITS = (RANDOM.standard_normal(VOCAB) * 3).astype(np.float32)
HISTORY = np.array([3, 7, 7, 7, 250, 499, 3], np.int32)


def expected(selection: Selection, logits: np.ndarray = LOGITS) -> np.ndarray:
    """What transformers makes of the same settings, in double precision."""
    steps: list[object] = []
    if selection.bias:
        steps.append(hf.SequenceBiasLogitsProcessor({(token,): value for token, value in selection.bias.items()}))
    if selection.repetition_penalty != 1:
        steps.append(hf.RepetitionPenaltyLogitsProcessor(selection.repetition_penalty))
    if selection.forbidden:
        steps.append(hf.NoBadWordsLogitsProcessor([list(word) for word in selection.forbidden]))
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
    scores = torch.from_numpy(logits.astype(np.float64))[None]
    for step in steps:
        scores = step(torch.from_numpy(HISTORY.astype(np.int64))[None], scores)  # type: ignore[operator]
    return torch.softmax(scores[0], -1).numpy()


WORDS = ((7,), (499, 3, 12), (3, 20), (4, 21), (250, 499, 3, 22))
SETTINGS: list[dict[str, Any]] = [
    {"temperature": 1.0},
    {"temperature": 0.6, "top_k": 40},
    {"temperature": 1.3, "top_p": 0.9},
    {"temperature": 0.2, "top_p": 0.5},
    {"temperature": 1.0, "top_p": 0.999},
    {"temperature": 1.0, "min_p": 0.1},
    {"temperature": 1.5, "typical_p": 0.8},
    {"temperature": 0.9, "typical_p": 0.2},
    {"temperature": 0.9, "top_k": 60, "top_p": 0.8, "min_p": 0.02},
    {"temperature": 0.9, "top_k": 100, "typical_p": 0.5, "repetition_penalty": 1.4},
    {"temperature": 0.7, "top_k": 1},
    {"temperature": 1.0, "top_k": 10_000},
    {"temperature": 1e-3},
    {"temperature": 50.0, "top_p": 0.7},
    {"temperature": 1.0, "repetition_penalty": 1.7},
    {"temperature": 1.0, "bias": {3: 2.5, 9: -4.0, 30: -np.inf}},
    {"temperature": 1.0, "forbidden": WORDS},
    {"temperature": 1.2, "bias": {3: 2.5, 7: -4.0}, "repetition_penalty": 0.8, "forbidden": WORDS, "top_k": 90, "top_p": 0.9,
     "min_p": 0.001, "typical_p": 0.9},
]  # fmt: skip


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_distribution_equals_transformers(settings: dict[str, Any]) -> None:
    selection = Selection(**settings)
    probabilities = Selector(selection).probabilities(LOGITS, HISTORY)
    assert np.allclose(probabilities, expected(selection), atol=1e-6)
    assert set(np.flatnonzero(probabilities)) <= set(np.flatnonzero(expected(selection)))


@pytest.fixture(params=instruction_sets())
def instruction_set(request: pytest.FixtureRequest) -> Iterator[None]:
    calls.set_instruction_set(request.param)
    yield
    calls.set_instruction_set(None)


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("steepness", [1.0, 3.0, 8.0])
def test_large_vocabularies_equal_transformers_on_every_instruction_set(steepness: float) -> None:
    """49,157 tokens: more than the few that are gathered, and no multiple of any width."""
    logits = (np.random.default_rng(1).standard_normal(49157) * steepness).astype(np.float32)
    for settings in SETTINGS:
        selection = Selection(**settings)
        probabilities = Selector(selection).probabilities(logits, HISTORY)
        assert np.abs(probabilities - expected(selection, logits)).max() < 1e-6, settings


def test_equal_logits_stay_together() -> None:
    logits = np.array([1.0, 3.0, 2.0, 3.0, 2.0, -np.inf, 2.0], np.float32)
    for settings in ({"top_k": 1}, {"top_k": 3}, {"min_p": 0.3}):
        selection = Selection(temperature=1.0, **settings)  # type: ignore[arg-type]
        found = Selector(selection).probabilities(logits, HISTORY[:0])
        assert np.allclose(found, expected(selection, logits), atol=1e-6), settings
    # Which of equal tokens top-p takes in transformers is left to its sort; here none is preferred.
    nucleus = Selector(Selection(temperature=1.0, top_p=0.6)).probabilities(logits, HISTORY[:0])
    assert np.flatnonzero(nucleus).tolist() == [1, 3] and np.allclose(nucleus[[1, 3]], 0.5)
    flat = Selector(Selection(temperature=1.0, top_p=0.01, typical_p=0.5)).probabilities(
        np.ones(2000, np.float32), HISTORY[:0]
    )
    assert np.allclose(flat, 1 / 2000)


def test_draws_of_a_whole_vocabulary_follow_its_distribution() -> None:
    logits = (np.random.default_rng(2).standard_normal(5000) * 2).astype(np.float32)
    logits[100:200] = -np.inf
    selector = Selector(Selection(temperature=1.0, seed=3))
    drawn = np.array([selector.choose(logits, HISTORY[:0]) for _ in range(20000)])
    probabilities = expected(Selection(temperature=1.0), logits)
    assert not ((drawn >= 100) & (drawn < 200)).any()
    for begin in range(0, 5000, 500):  # the shares of stretches of tokens
        share, inside = probabilities[begin : begin + 500].sum(), (drawn >= begin) & (drawn < begin + 500)
        assert abs(inside.mean() - share) < 4 * np.sqrt(share * (1 - share) / len(drawn))


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


def test_scores_are_adjusted_as_by_transformers() -> None:
    """What a beam search asks for: everything before the temperature, in place."""
    scores = torch.log_softmax(torch.from_numpy(LOGITS), -1).numpy().copy()
    selection = Selection(bias={3: 1.5}, repetition_penalty=1.3, forbidden=WORDS, min_new_tokens=3)
    ids, steps = torch.from_numpy(HISTORY.astype(np.int64))[None], torch.from_numpy(scores.copy())[None]
    for step in (
        hf.SequenceBiasLogitsProcessor({(3,): 1.5}),
        hf.RepetitionPenaltyLogitsProcessor(1.3),
        hf.NoBadWordsLogitsProcessor([list(word) for word in WORDS]),
    ):
        steps = step(ids, steps)
    selector, ending = Selector(selection, stop_tokens=(40, 41)), steps[0].numpy().copy()
    for made in (3, 2):  # at the third token the answer may end
        if made < 3:
            ending[[40, 41]] = -np.inf
        found = scores.copy()
        selector.adjust_(found, HISTORY, made)
        assert np.allclose(found, ending, atol=1e-6)


def test_generation_config() -> None:
    sampled = Selection.from_generation_config({"do_sample": True, "temperature": 0.3, "top_p": 0.9, "max_length": 20})
    assert (sampled.temperature, sampled.top_k, sampled.top_p) == (0.3, 50, 0.9)
    greedy = Selection.from_generation_config({"temperature": 0.3, "repetition_penalty": 1.1})
    assert (greedy.temperature, greedy.repetition_penalty) == (0.0, 1.1)


@pytest.mark.parametrize(
    "settings",
    [
        {"top_p": 0.0},
        {"temperature": -1},
        {"temperature": np.inf},
        {"min_p": 2},
        {"repetition_penalty": 0},
        {"repetition_penalty": np.inf},
        {"typical_p": 0},
        {"presence_penalty": np.nan},
        {"frequency_penalty": -np.inf},
        {"bias": {3: np.nan}},
        {"bias": {3: np.inf}},
        {"min_new_tokens": -1},
        {"top_k": -1},
        {"forbidden": ((3,), ())},
    ],
    ids=str,
)
def test_settings_out_of_range_say_what_is_allowed(settings: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="out of range; use"):
        Selection(**settings)


def test_unusable_logits_and_tokens_are_refused() -> None:
    with pytest.raises(KernelError, match="NaN, infinite or all forbidden"):
        Selector(Selection()).choose(np.full(5, np.nan, np.float32), HISTORY[:0])
    with pytest.raises(KernelError, match="outside the vocabulary of 5"):
        Selector(Selection(repetition_penalty=2)).choose(np.zeros(5, np.float32), HISTORY)
    with pytest.raises(KernelError, match="a forbidden word holds token 9, outside the vocabulary of 5"):
        Selector(Selection(forbidden=((1, 2), (9, 1)))).choose(np.zeros(5, np.float32), HISTORY[:0])
    with pytest.raises(RecipeError, match="did you mean temperature"):
        Selection().replace(temprature=1)
