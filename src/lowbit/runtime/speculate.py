"""Guesses at the next tokens, which the loop of generation.py checks in one step.

    PromptLookup   the last few tokens occurred before: what followed them then may follow again (summaries, code, edits)
    DraftModel     a small model of the same vocabulary says what it would write

A guess only ever costs time: every token is chosen from the model's own logits.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lowbit.errors import LowbitError
from lowbit.runtime.slots import Slot, Tokens

# Longer repetitions are looked for first: they guess better. One token alone repeats too often by chance.
_LONGEST_MATCH, _SHORTEST_MATCH = 3, 2


class PromptLookup:
    """Looks for the latest earlier place where the last tokens stood, and guesses what followed there."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __call__(self, tokens: Tokens, room: int) -> Sequence[int]:
        count = min(self.count, room)
        for length in range(_LONGEST_MATCH, _SHORTEST_MATCH - 1, -1):
            if count < 1 or len(tokens) <= length:
                continue
            windows = np.lib.stride_tricks.sliding_window_view(tokens[:-1], length)
            places = np.flatnonzero((windows == tokens[-length:]).all(-1))
            if len(places):
                begin = int(places[-1]) + length
                return [int(t) for t in tokens[begin : begin + count]]
        return []


class DraftModel:
    """Greedy guesses of another engine with the same vocabulary."""

    def __init__(self, slot: Slot, count: int, vocabulary: int) -> None:
        if slot.engine.spec.vocab_size != vocabulary:
            raise LowbitError(
                f"the draft model knows {slot.engine.spec.vocab_size} tokens and this one {vocabulary}: "
                "use a draft model of the same family, whose tokenizer is the same"
            )
        self.slot, self.count = slot, count

    def __call__(self, tokens: Tokens, room: int) -> Sequence[int]:
        count = min(self.count, room, self.slot.engine.context - len(tokens))
        guesses: list[int] = []
        while len(guesses) < count:
            whole = np.concatenate([tokens, np.asarray(guesses, np.int32)])
            guesses.append(int(self.slot.advance(whole).argmax()))
        return guesses
