"""How good a model is, in numbers: perplexity on a text, and the distance from the model that it was made from.

A text is cut into windows of tokens that do not overlap; each token is predicted from those before it in its window:

    nll = mean over tokens of  -log q(token | before)                perplexity = exp(nll)
    kl  = mean over tokens of  sum_v p(v) (log p(v) - log q(v))      p the original's prediction, q the model's

The divergence tells formats apart with far less text than perplexity does: at every token it compares whole
distributions instead of one probability, and both models see the same tokens. Standard errors are taken over windows,
because the tokens of one window are not independent; `windows_kl` keeps each window's mean, so that two recipes can be
compared by their differences window by window, which is several times sharper than comparing their means.

A model is anything that gives logits: a transformers model, an engine with `logits(ids)`, or a function from ids [1, n]
to logits [1, n, vocabulary]. One window is in flight at a time and log-softmax runs in fp32 over slices of it: 25 MB
for a vocabulary of 49152.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lowbit.errors import RecipeError

Logits = Callable[[torch.Tensor], torch.Tensor]
Advance = Callable[[str], None]
# Positions whose distributions are in fp32 at once.
_SLICE = 128


@dataclass(frozen=True)
class Perplexity:
    """How well a model predicts a text. `standard_error` is that of the mean negative log-likelihood `nll`."""

    ppl: float
    nll: float
    standard_error: float
    tokens: int
    windows: int


@dataclass(frozen=True)
class Divergence:
    """How far a model is from the original. `agreement` is how often both find the same token likeliest."""

    kl: float
    standard_error: float
    agreement: float
    perplexity: Perplexity
    original: Perplexity
    windows_kl: tuple[float, ...]


def perplexity(
    model: Any,
    tokenizer_or_ids: Any,
    text: str | None = None,
    window: int = 512,
    windows: int | None = None,
    progress: Advance | None = None,
) -> Perplexity:
    """The perplexity of a model on a text (with its tokenizer) or on token ids, or on only its first `windows`."""
    ids = tokenizer_or_ids if text is None else token_ids(tokenizer_or_ids, text)
    logits = logits_of(model)
    losses = []
    with torch.inference_mode():
        for row in cut_windows(ids, window, windows):
            losses.append(_losses(_row_logits(logits, row), row))
            _advance(progress, len(losses))
    return _perplexity(losses)


def divergence(
    model: Any,
    original: Any,
    ids: Any,
    window: int = 512,
    windows: int | None = None,
    progress: Advance | None = None,
) -> Divergence:
    """The distance of a model from the original on token ids, which `token_ids` makes of a text."""
    ours, theirs = logits_of(model), logits_of(original)
    losses: list[torch.Tensor] = []
    original_losses, means, agreements = [], [], []
    with torch.inference_mode():
        for row in cut_windows(ids, window, windows):
            predicted, expected = _row_logits(ours, row), _row_logits(theirs, row)
            losses.append(_losses(predicted, row))
            original_losses.append(_losses(expected, row))
            means.append(float(_divergences(expected, predicted).mean()))
            agreements.append(float((expected.argmax(-1) == predicted.argmax(-1)).float().mean()))
            _advance(progress, len(losses))
    error = standard_error(means)
    kl, agreement = _mean(means), _mean(agreements)
    return Divergence(kl, error, agreement, _perplexity(losses), _perplexity(original_losses), tuple(means))


def token_ids(tokenizer: Any, text: str) -> list[int]:
    """The ids of a text, without the tokens that a tokenizer puts around a prompt."""
    if not text.strip():
        raise RecipeError("the text is empty; there is nothing to predict")
    encoded = (
        tokenizer(text, add_special_tokens=False, verbose=False) if callable(tokenizer) else tokenizer.encode(text)
    )
    ids = encoded["input_ids"] if hasattr(encoded, "keys") else getattr(encoded, "ids", encoded)
    return [int(i) for i in ids]


def cut_windows(ids: Any, window: int = 512, windows: int | None = None) -> torch.Tensor:
    """Token ids as [windows, window]; ids that already are rows of windows are taken as they are."""
    tokens = torch.as_tensor(ids, dtype=torch.long).cpu()
    if window < 2:
        raise RecipeError(f"a window of {window} tokens predicts nothing; a window needs at least 2")
    if windows is not None and windows < 1:
        raise RecipeError(f"{windows} windows are nothing to measure on; ask for at least 1")
    if tokens.dim() == 1:
        if len(tokens) < window:
            shorter = f" or a window of at most {len(tokens)}" if len(tokens) > 1 else ""
            raise RecipeError(
                f"the text has {len(tokens)} tokens, less than one window of {window}; use a longer text{shorter}"
            )
        tokens = tokens[: len(tokens) // window * window].view(-1, window)
    if tokens.dim() != 2 or tokens.shape[-1] < 2:
        raise RecipeError(f"token ids of shape {list(tokens.shape)} are neither one text nor rows of at least 2 tokens")
    if windows is not None and windows > len(tokens):
        raise RecipeError(
            f"the text holds {len(tokens)} windows of {tokens.shape[-1]} tokens, {windows} were asked for"
        )
    return tokens[:windows]


def logits_of(model: Any) -> Logits:
    """The function ids [1, n] -> logits [1, n, vocab] of a model, an engine, or a function that already is one."""
    own = getattr(model, "logits", None)
    if callable(own):
        engine_logits: Logits = own
        return engine_logits
    if not isinstance(model, nn.Module):
        if not callable(model):
            raise RecipeError(
                f"a {type(model).__name__} gives no logits; pass a causal language model or a function of token ids"
            )
        function: Logits = model
        return function
    device = next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu"))

    def logits(ids: torch.Tensor) -> torch.Tensor:
        output = model(ids.to(device))
        found = getattr(output, "logits", output)
        if not isinstance(found, torch.Tensor):
            raise RecipeError(
                f"a {type(model).__name__} gives no logits; perplexity needs a model with a language model head"
            )
        return found

    return logits


def standard_error(values: Sequence[float]) -> float:
    """The standard error of a mean; 0 for a single value, which says nothing about its spread."""
    if len(values) < 2:
        return 0.0
    mean = _mean(values)
    return math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))


def _row_logits(logits: Logits, row: torch.Tensor) -> torch.Tensor:
    """The logits of one window: [n, vocab]."""
    found = torch.as_tensor(logits(row[None]))
    return found.reshape(len(row), -1)


def _losses(logits: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
    """-log q of each token of a window but the first, which nothing precedes: [n - 1]."""
    next_tokens = row[1:].to(logits.device)
    parts = []
    for some, tokens in zip(torch.split(logits[:-1], _SLICE), torch.split(next_tokens, _SLICE), strict=True):
        parts.append(nn.functional.cross_entropy(some.float(), tokens, reduction="none"))
    return torch.cat(parts).double().cpu()


def _divergences(expected: torch.Tensor, predicted: torch.Tensor) -> torch.Tensor:
    """KL(expected || predicted) at each position: [n]."""
    parts = []
    for p, q in zip(torch.split(expected, _SLICE), torch.split(predicted, _SLICE), strict=True):
        log_p = p.float().log_softmax(-1)
        log_q = q.to(p.device).float().log_softmax(-1)
        parts.append((log_p.exp() * (log_p - log_q)).sum(-1))
    return torch.cat(parts).double().cpu()


def _perplexity(losses: list[torch.Tensor]) -> Perplexity:
    means = [float(row.mean()) for row in losses]
    nll = _mean(means)
    # Above 700 exp overflows a double; a model that bad is no better than infinitely bad.
    ppl = math.exp(nll) if nll < 700 else math.inf
    return Perplexity(ppl, nll, standard_error(means), sum(len(row) for row in losses), len(losses))


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return math.fsum(listed) / len(listed)


def _advance(progress: Advance | None, done: int) -> None:
    if progress is not None:
        progress(f"window {done}")
