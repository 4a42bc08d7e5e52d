"""Tuning: candidates in order until one is good enough by the caller's own measure.

    relative    accuracy >= accuracy of the original * (1 - loss)
    absolute    accuracy >= accuracy of the original - loss

Higher is better. With time left candidates go on being tried, and the best of those that are good enough wins.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from lowbit.errors import RecipeError

KINDS = ("relative", "absolute")


@dataclass(frozen=True)
class Criterion:
    """How much may be lost."""

    kind: Literal["relative", "absolute"] = "relative"
    loss: float = 0.01

    def __post_init__(self) -> None:
        if self.kind not in KINDS or not isinstance(self.loss, int | float) or not self.loss >= 0:
            raise RecipeError(
                "a criterion is {'relative': LOSS} or {'absolute': LOSS} with a loss from 0 up, "
                f"and was {self.kind!r}: {self.loss!r}"
            )

    def least(self, original: float) -> float:
        """The least accuracy that is good enough."""
        return original - (abs(original) * self.loss if self.kind == "relative" else self.loss)


@dataclass(frozen=True)
class Candidate:
    """Something to try: its name, what it is for its maker, and how a model is made of it."""

    name: str
    value: Any
    make: Callable[[], nn.Module]


@dataclass(frozen=True)
class Tuned:
    """The candidate that won, its accuracy and that of the original, and what was tried: name and accuracy."""

    candidate: Candidate
    accuracy: float
    original: float
    tried: tuple[tuple[str, float], ...]


def tune(
    original: float,
    candidates: Iterable[Candidate],
    evaluate: Callable[[nn.Module], Any],
    criterion: Criterion,
    seconds: float = 0.0,
) -> Tuned:
    """Try candidates until one meets the criterion; with `seconds` go on as long, and take the best."""
    start, least = time.perf_counter(), criterion.least(original)
    best: tuple[float, Candidate] | None = None
    tried: list[tuple[str, float]] = []
    for candidate in candidates:
        accuracy = float(evaluate(candidate.make()))
        tried.append((candidate.name, accuracy))
        if best is None or accuracy > best[0]:
            best = accuracy, candidate
        if best[0] >= least and time.perf_counter() - start >= seconds:
            break
    if best is None:
        raise RecipeError("there is nothing to try: tuning needs at least one candidate")
    if best[0] < least:
        raise RecipeError(
            f"none of {len(tried)} candidates keeps the accuracy of {original:.4g} within {criterion.loss:g} ({criterion.kind}): "
            f"the best is {best[1].name} with {best[0]:.4g}; allow a larger loss, or calibrate on more samples"
        )
    return Tuned(best[1], best[0], original, tuple(tried))
