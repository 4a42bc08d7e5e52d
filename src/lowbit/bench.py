"""Timings of a model that answers: the first token, the later ones, memory.

Reading the prompt and writing the answer are different work, so they are told apart: the first token comes after the
whole prompt was read (many rows at once), each later one after one row. Of the later ones the mean says how fast, P90
and P99 how evenly.

    generate(new_tokens) -> seconds from the start to each token     timed `rounds` times, after one round that warms up
    answer(new_tokens) -> seconds to the first token and to the end  for batches and beams, whose tokens come together

What runs the model is the caller's business: this file imports neither torch nor transformers.
"""

from __future__ import annotations

import resource
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

Generate = Callable[[int], Sequence[float]]
Answer = Callable[[int], tuple[float | None, float]]
_PROCESS_STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class Timings:
    """The figures of one model on one machine. Times in seconds."""

    prompt_tokens: int
    new_tokens: int
    rounds: int
    first_token: float
    later_mean: float
    later_p90: float
    later_p99: float

    @property
    def prompt_tokens_per_second(self) -> float:
        return self.prompt_tokens / max(self.first_token, 1e-9)

    @property
    def tokens_per_second(self) -> float:
        """The speed after the first token."""
        return 1 / max(self.later_mean, 1e-9)

    def to_dict(self) -> dict[str, Any]:
        speeds = {
            "prompt_tokens_per_second": self.prompt_tokens_per_second,
            "tokens_per_second": self.tokens_per_second,
        }
        return asdict(self) | speeds


def measure(
    generate: Generate,
    prompt_tokens: int,
    new_tokens: int,
    rounds: int = 3,
    after_round: Callable[[str], None] | None = None,
) -> Timings:
    """Time a model: one round to warm up, then `rounds` that count. The time of the first token is their median."""
    firsts: list[float] = []
    gaps: list[float] = []
    for number in range(rounds + 1):
        seconds = list(generate(new_tokens))
        if len(seconds) < 2:
            raise ValueError(
                f"a round needs at least 2 tokens to tell the first from the later ones, got {len(seconds)}"
            )
        if number:
            firsts.append(seconds[0])
            gaps += [later - earlier for earlier, later in pairwise(seconds)]
        if after_round is not None:
            after_round(f"round {number} of {rounds}" if number else "warm")
    return Timings(
        prompt_tokens,
        new_tokens,
        rounds,
        first_token=statistics.median(firsts),
        later_mean=statistics.fmean(gaps),
        later_p90=percentile(gaps, 0.90),
        later_p99=percentile(gaps, 0.99),
    )


@dataclass(frozen=True)
class AnswerTimings:
    """What whole answers to a batch of prompts took, in seconds, and how much of it their first tokens, if that is asked."""

    batch: int
    prompt_tokens: int
    new_tokens: int
    seconds: tuple[float, ...]
    first_seconds: tuple[float, ...] = ()

    @property
    def latency(self) -> float:
        """Of one call: the mean over those that count."""
        return statistics.fmean(self.seconds)

    @property
    def latency_per_token(self) -> float:
        """Until every sequence has one token more, the reading of the prompt shared out among all of them."""
        return self.latency / self.new_tokens

    @property
    def tokens_per_second(self) -> float:
        """New tokens of all sequences together."""
        return self.batch * self.new_tokens / max(self.latency, 1e-9)

    @property
    def answers_per_second(self) -> float:
        return self.batch / max(self.latency, 1e-9)

    @property
    def first_token(self) -> float | None:
        return statistics.fmean(self.first_seconds) if self.first_seconds else None

    @property
    def later_token(self) -> float | None:
        """What is left of an answer without its first token, for each of the others."""
        if self.first_token is None or self.new_tokens < 2:
            return None
        return (self.latency - self.first_token) / (self.new_tokens - 1)

    def to_dict(self) -> dict[str, Any]:
        names = (
            "latency",
            "latency_per_token",
            "tokens_per_second",
            "answers_per_second",
            "first_token",
            "later_token",
        )
        return asdict(self) | {name: getattr(self, name) for name in names}


def measure_answers(answer: Answer, timings: AnswerTimings, rounds: int, warmup: int) -> AnswerTimings:
    """Time whole answers: `warmup` calls that do not count, then `rounds` that do."""
    taken = [answer(timings.new_tokens) for _ in range(warmup + rounds)][warmup:]
    firsts = tuple(first for first, _ in taken if first is not None)
    return replace(timings, seconds=tuple(whole for _, whole in taken), first_seconds=firsts)


def prompt_of(tokens: list[int], length: int) -> list[int]:
    """A prompt of an exact length: the tokens over and over."""
    return (tokens * (length // len(tokens) + 1))[:length]


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which a share of the values lies, on a straight line between neighbours."""
    ordered = sorted(values)
    position = share * (len(ordered) - 1)
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def peak_memory() -> int:
    """The most memory in bytes that this process has held at once."""
    if _PROCESS_STATUS.is_file():  # getrusage would also count what the parent held before it started us
        for line in _PROCESS_STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
