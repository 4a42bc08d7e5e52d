"""Perplexity where torch is absent: the figures of `lowbit.evaluate.perplexity`, from the engine's logits in numpy.

nll = mean over tokens of -log q(token | before), over windows that do not overlap;  perplexity = exp(nll)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from lowbit.runtime.generation import log_softmax


class Measured(NamedTuple):
    """The fields of `lowbit.evaluate.Perplexity`."""

    ppl: float
    nll: float
    standard_error: float
    tokens: int
    windows: int


def perplexity(model: Any, rows: list[list[int]], progress: Callable[[str], None]) -> Measured:
    """How well a model of the engine predicts windows of tokens."""
    means = []
    for number, row in enumerate(rows, 1):
        scores = log_softmax(model.logits(row)[:-1])
        chosen = np.take_along_axis(scores, np.asarray(row[1:])[:, None], -1)
        means.append(-float(chosen.mean(dtype=np.float64)))
        progress(f"window {number}")
    nll = math.fsum(means) / len(means)
    error = float(np.std(means, ddof=1)) / math.sqrt(len(means)) if len(means) > 1 else 0.0
    return Measured(math.exp(min(nll, 700)), nll, error, sum(len(row) - 1 for row in rows), len(rows))
