"""Guesses at the next tokens, which the loop of generation.py checks in one step.

    PromptLookup   the last few tokens occurred before: what followed them then may follow again (summaries, code, edits)
    DraftModel     a small model of the same vocabulary says what it would write, while it is sure enough of it (`Caution`)

A guess only ever costs time: every token is chosen from the model's own logits. What became of the guesses is counted.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lowbit.errors import LowbitError, RecipeError
from lowbit.runtime.slots import Floats, Slot, Tokens

# Longer repetitions are looked for first: they guess better. One token alone repeats too often by chance.
_LONGEST_MATCH, _SHORTEST_MATCH = 3, 2


class Guesser(ABC):
    """Makes guesses, and counts how many there were (`drafted`), how many of them the model wrote itself (`matched`), and the steps
    of the model (`steps`)."""

    def __init__(self, count: int) -> None:
        if count < 1:
            raise RecipeError(f"{count} guesses at a time are none: use a number from 1 up")
        self.count = count
        self.drafted = self.matched = self.steps = 0
        self._begin, self._last = 0, list[int]()

    def __call__(self, tokens: Tokens, room: int) -> Sequence[int]:
        """Guesses at what follows `tokens`, at most `room`."""
        self.settle(tokens)
        self.steps += 1
        self._begin, self._last = len(tokens), list(self.guess(tokens, room))
        self.drafted += len(self._last)
        return self._last

    def settle(self, tokens: Tokens) -> tuple[int, int]:
        """Count which of the last guesses stand in `tokens`: how many are right, of how many."""
        written = tokens[self._begin : self._begin + len(self._last)].tolist()
        wrong = (at for at, (guess, token) in enumerate(zip(self._last, written, strict=False)) if guess != token)
        matched = next(wrong, min(len(written), len(self._last)))
        made, self._last = len(self._last), []
        self.matched += matched
        return matched, made

    @abstractmethod
    def guess(self, tokens: Tokens, room: int) -> Sequence[int]: ...


class PromptLookup(Guesser):
    """Looks for the latest earlier place where the last tokens stood, and guesses what followed there.

    `longest` is the longest repetition that is looked for.
    """

    def __init__(self, count: int, longest: int = _LONGEST_MATCH) -> None:
        super().__init__(count)
        self.longest = longest

    def guess(self, tokens: Tokens, room: int) -> Sequence[int]:
        count = min(self.count, room)
        for length in range(self.longest, min(_SHORTEST_MATCH, self.longest) - 1, -1):
            if count < 1 or len(tokens) <= length:
                continue
            windows = np.lib.stride_tricks.sliding_window_view(tokens[:-1], length)
            places = np.flatnonzero((windows == tokens[-length:]).all(-1))
            if len(places):
                begin = int(places[-1]) + length
                return [int(t) for t in tokens[begin : begin + count]]
        return []


@dataclass(frozen=True)
class Caution:
    """When a draft stops guessing: after a guess to which it gives a probability below `least`, once there are `guesses` of them.

    With `adapts` that bound follows how often the guesses are right, as in self-speculative decoding (arXiv 2309.08168): every
    `every` rounds it rises by `step` if the share of right guesses, a running mean with the weight `memory` for its past, is
    below `wanted`, and falls by as much if it is not and the round ended early; `inertia` is the weight of the bound before.
    """

    least: float = 0.0
    guesses: int = 1
    adapts: bool = False
    every: int = 1
    memory: float = 0.5
    wanted: float = 0.9
    step: float = 0.01
    inertia: float = 0.9

    def __post_init__(self) -> None:
        for name in ("least", "memory", "wanted", "step", "inertia"):
            if not 0 <= getattr(self, name) <= 1:
                raise RecipeError(f"{name}={getattr(self, name)} is out of range; use a share between 0 and 1")
        if self.every < 1 or self.guesses < 1:
            raise RecipeError(f"every={self.every} and guesses={self.guesses} are counts; use numbers from 1 up")


class DraftModel(Guesser):
    """Greedy guesses of another engine with the same vocabulary."""

    def __init__(self, slot: Slot, count: int, vocabulary: int, caution: Caution | None = None) -> None:
        super().__init__(count)
        if slot.engine.spec.vocab_size != vocabulary:
            raise LowbitError(
                f"the draft model knows {slot.engine.spec.vocab_size} tokens and this one {vocabulary}: "
                "use a draft model of the same family, whose tokenizer is the same"
            )
        self.slot, self.caution = slot, caution or Caution()
        self.least = self.caution.least
        self.agreement, self._rounds = 0.0, 0

    def guess(self, tokens: Tokens, room: int) -> Sequence[int]:
        count = min(self.count, room, self.slot.engine.context - len(tokens))
        guesses: list[int] = []
        while len(guesses) < count:
            whole = np.concatenate([tokens, np.asarray(guesses, np.int32)])
            logits = self.slot.advance(whole)
            guesses.append(int(logits.argmax()))
            if self.least and len(guesses) >= self.caution.guesses and top_probability(logits) < self.least:
                break
        return guesses

    def settle(self, tokens: Tokens) -> tuple[int, int]:
        matched, made = super().settle(tokens)
        if made:
            self._rounds += 1
            if self.caution.adapts and self._rounds % self.caution.every == 0:
                self._adapt(matched, made)
        return matched, made

    def _adapt(self, matched: int, made: int) -> None:
        """Move the bound by how many of the last guesses were right."""
        caution = self.caution
        self.agreement = caution.memory * self.agreement + (1 - caution.memory) * matched / made
        aim = self.least
        if self.agreement < caution.wanted:
            aim += caution.step
        elif made < self.count:
            aim -= caution.step
        self.least = min(max(caution.inertia * self.least + (1 - caution.inertia) * aim, 0.0), 1.0)


def top_probability(logits: Floats) -> float:
    """The probability of the likeliest token."""
    return 1.0 / float(np.exp(logits - logits.max()).sum(dtype=np.float64))
