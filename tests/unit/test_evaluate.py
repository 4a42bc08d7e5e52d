"""Perplexity and divergence against definitions in plain Python, and what they refuse."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from lowbit.errors import RecipeError
from lowbit.evaluate import cut_windows, divergence, logits_of, perplexity, standard_error, token_ids

VOCABULARY = 11


class Bigram(nn.Module):
    """Logits that depend on the current token alone, in the shape that transformers' models give."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        table = torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(seed))
        self.table = nn.Parameter(table)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.table[ids]


class Engine:
    """What has `logits` and is no module."""

    def __init__(self, model: Bigram) -> None:
        self.model = model

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(ids)


def random_ids(count: int) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (count,), generator=torch.Generator().manual_seed(7))


def log_probabilities(model: Bigram, token: int) -> list[float]:
    row = model.table[token].tolist()
    total = math.log(sum(math.exp(v) for v in row))
    return [v - total for v in row]


def test_perplexity_is_its_definition() -> None:
    model, ids = Bigram(0), random_ids(40)
    found = perplexity(model, ids, window=13)
    windows = [ids[i : i + 13].tolist() for i in (0, 13, 26)]
    losses = [-log_probabilities(model, a)[b] for w in windows for a, b in pairwise(w)]
    assert found.tokens == len(losses) == 36 and found.windows == 3
    assert found.nll == pytest.approx(sum(losses) / 36, rel=1e-5)
    assert found.ppl == pytest.approx(math.exp(sum(losses) / 36), rel=1e-5)


def test_divergence_is_its_definition() -> None:
    model, original, ids = Bigram(0), Bigram(1), random_ids(30)
    found = divergence(model, original, ids, window=10)
    values, same = [], 0
    for token in ids.tolist():
        p, q = log_probabilities(original, token), log_probabilities(model, token)
        values.append(sum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True)))
        same += p.index(max(p)) == q.index(max(q))
    means = [sum(values[i : i + 10]) / 10 for i in (0, 10, 20)]
    assert found.kl == pytest.approx(sum(values) / 30, rel=1e-5)
    assert found.windows_kl == pytest.approx(means, rel=1e-5)
    assert found.standard_error == pytest.approx(standard_error(means), rel=1e-4)
    assert found.agreement == pytest.approx(same / 30)
    assert found.perplexity == perplexity(model, ids, window=10)
    assert found.original == perplexity(original, ids, window=10)


def test_a_model_is_no_distance_from_itself() -> None:
    found = divergence(Bigram(3), Bigram(3), random_ids(300), window=150)
    assert found.kl == pytest.approx(0, abs=1e-7) and found.agreement == 1


def test_windows_longer_than_a_slice() -> None:
    model, ids = Bigram(2), random_ids(300)
    losses = [-log_probabilities(model, int(a))[int(b)] for a, b in pairwise(ids)]
    assert perplexity(model, ids, window=300).nll == pytest.approx(sum(losses) / 299, rel=1e-5)


def test_engines_and_functions_give_logits() -> None:
    model, ids = Bigram(0), random_ids(20)
    expected = perplexity(model, ids, window=10)
    assert perplexity(Engine(model), ids, window=10) == expected
    assert perplexity(lambda batch: model.table[batch], ids, window=10) == expected


def test_half_precision_is_measured_in_fp32() -> None:
    model = Bigram(0).half()
    full = Bigram(0)
    full.table.data = model.table.data.float()
    ids = random_ids(40)
    assert perplexity(model, ids, window=20).nll == pytest.approx(perplexity(full, ids, window=20).nll, rel=1e-6)


def test_text_goes_through_the_tokenizer() -> None:
    def tokenizer(text: str, add_special_tokens: bool, verbose: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": [ord(c) % VOCABULARY for c in text]}

    text = "how often does a window fit"
    assert token_ids(tokenizer, text) == [ord(c) % VOCABULARY for c in text]
    assert perplexity(Bigram(0), tokenizer, text, window=9).windows == 3


def test_progress_hears_of_every_window() -> None:
    heard: list[str] = []
    perplexity(Bigram(0), random_ids(40), window=10, windows=3, progress=heard.append)
    assert heard == ["window 1", "window 2", "window 3"]


def test_rows_of_windows_are_taken_as_they_are() -> None:
    rows = random_ids(24).view(3, 8)
    assert torch.equal(cut_windows(rows), rows)
    assert torch.equal(cut_windows(rows, windows=2), rows[:2])


def test_standard_error() -> None:
    assert standard_error([1.0, 2.0, 3.0, 4.0]) == pytest.approx(math.sqrt(5 / 3 / 4))
    assert standard_error([2.0]) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 1}, "at least 2"),
        ({"window": 64}, "less than one window of 64"),
        ({"window": 10, "windows": 0}, "at least 1"),
        ({"window": 10, "windows": 9}, "holds 4 windows"),
    ],
)
def test_windows_that_cannot_be_cut(options: dict[str, int], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        perplexity(Bigram(0), random_ids(40), **options)


def test_empty_text_is_refused() -> None:
    with pytest.raises(RecipeError, match="empty"):
        token_ids(lambda text: text, " \n ")
    with pytest.raises(RecipeError, match="0 tokens"):
        perplexity(Bigram(0), [], window=4)


def test_what_gives_no_logits_is_refused() -> None:
    with pytest.raises(RecipeError, match="gives no logits"):
        logits_of("a name")
