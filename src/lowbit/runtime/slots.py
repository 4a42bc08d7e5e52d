"""What lies in the slots of an engine's cache, so that nothing is read twice.

An engine continues sequences: it keeps the keys and values of the tokens that a slot has seen. A `Slot` remembers
which tokens those were, and brings the engine to any other sequence by the shortest way:

    cached   a b c d e          forget what follows the common start (a b), read the rest (x y)
    wanted   a b x y            -> the logits after y

So the next message of a chat pays for itself alone, a rejected guess costs nothing, and several sequences may take
turns in one slot and stay right. The note is written before the engine moves: an interruption at any point leaves it
true or cautious, never wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from lowbit.errors import LowbitError
from lowbit.models.spec import DecoderSpec

Floats = NDArray[np.float32]
Tokens = NDArray[np.int32]


class Engine(Protocol):
    """What the runtime asks of an engine. Logits are fp32 [vocabulary]."""

    @property
    def spec(self) -> DecoderSpec: ...
    @property
    def context(self) -> int: ...
    @property
    def slots(self) -> int: ...
    def prefill(self, ids: Sequence[int] | Tokens, slot: int = 0) -> Floats:
        """Read tokens; the logits after the last."""
        ...

    def decode(self, token: int, slot: int = 0) -> Floats: ...
    def logits(self, ids: Sequence[int] | Tokens, slot: int = 0) -> Floats:
        """Read tokens; the logits after each, [tokens, vocabulary]."""
        ...

    def step(self, tokens: Sequence[int] | Tokens, slots: Sequence[int] | Tokens) -> Floats:
        """Read one token after another, each in its slot; the logits after each, [tokens, vocabulary]."""
        ...

    def length(self, slot: int = 0) -> int: ...
    def truncate(self, slot: int, length: int) -> None: ...
    def shortest(self, slot: int = 0) -> int:
        """The fewest tokens above none that a slot can be cut to."""
        ...

    def copy(self, source: int, target: int, length: int, common: int = 0) -> None:
        """The first tokens of one slot into another, which holds some of them already."""
        ...

    def check(self, on: bool) -> None:
        """Say which layer makes the first NaN."""
        ...


class Slot:
    """One slot of an engine, and the tokens in it."""

    def __init__(self, engine: Engine, number: int = 0) -> None:
        self.engine, self.number = engine, number
        self.tokens: Tokens = np.empty(0, np.int32)
        self.readers = 0  # answers under way here
        # Where frequencies change with the length, keys that were cached early are turned differently in a longer sequence.
        # `turned` is the length of the one that those here were turned for.
        changing = [r for r in (layer.rope for layer in engine.spec.layers) if r and r.depends_on_length]
        self.fixed_until = min((r.trained_positions for r in changing), default=engine.context)
        self.two_tables = bool(changing) and all(r.kind == "longrope" for r in changing)
        self.turned = 0

    def common(self, tokens: Tokens) -> int:
        """How many of these tokens need not be read; the last one always must, for its logits."""
        held = min(self.engine.length(self.number), len(self.tokens))
        length = min(held, len(tokens) - 1)
        different = np.flatnonzero(self.tokens[:length] != tokens[:length])
        same = int(different[0]) if len(different) else length
        goes_on = same == held == len(tokens) - 1  # where the slot stands
        if self.two_tables:  # past the trained length everything is read again, once, as transformers' Phi-3 does
            otherwise_turned = (self.turned > self.fixed_until) != (len(tokens) > self.fixed_until)
        else:
            otherwise_turned = not goes_on and max(held, len(tokens)) > self.fixed_until
        return 0 if otherwise_turned or (not goes_on and same < self.engine.shortest(self.number)) else same

    def may_split(self, tokens: Tokens) -> bool:
        """Whether what is missing of a sequence may be read in several steps, the first of which do not know its length."""
        return len(tokens) <= self.fixed_until or self.common(tokens) == len(tokens) - 1

    def guesses_after(self, tokens: Tokens, room: int) -> int:
        """How many guesses one step may read with a sequence: so many that they turn none of its tokens otherwise."""
        if len(tokens) <= self.fixed_until:
            return min(room, self.fixed_until - len(tokens))
        return room if self.two_tables and self.may_split(tokens) else 0

    def copy(self, source: Slot, tokens: Tokens) -> None:
        """Take over what another slot holds of a sequence; only what this one lacks moves."""
        length = source.common(tokens)
        common = min(self.common(tokens), length)
        self.tokens = self.tokens[:common]
        self.engine.copy(source.number, self.number, length, common)
        self.tokens, self.turned = tokens[:length].copy(), source.turned

    def advance(self, tokens: Tokens) -> Floats:
        """The logits after a sequence, reading only what the slot does not hold."""
        missing = self._forget(tokens)
        if len(missing) == 1:
            return self.engine.decode(int(missing[0]), self.number)
        return self.engine.prefill(missing, self.number)

    def advance_over(self, tokens: Tokens, guesses: Sequence[int]) -> Floats:
        """The logits after a sequence and after each of the guesses that follow it, [1 + guesses, vocabulary]."""
        if not guesses:
            return self.advance(tokens)[None]
        whole = np.concatenate([tokens, np.asarray(guesses, np.int32)])
        self.hold_all_but_last(tokens)
        self.tokens = whole
        rows = whole[len(tokens) - 1 :]
        return self.engine.step(rows, np.full(len(rows), self.number, np.int32))

    def hold_all_but_last(self, tokens: Tokens) -> int:
        """Make the slot hold a sequence but for its last token, which the caller will have read: it is returned."""
        if len(tokens) - self.common(tokens) > 1:
            self.advance(tokens[:-1])
        self._forget(tokens)
        return int(tokens[-1])

    def clear(self) -> None:
        self.hold(self.tokens[:0])
        self.engine.truncate(self.number, 0)

    def hold(self, tokens: Tokens) -> None:
        """Take note of what the engine is about to hold here, or was given."""
        self.tokens, self.turned = tokens.copy(), len(tokens)

    def _forget(self, tokens: Tokens) -> Tokens:
        """Make the slot hold nothing but the start of a sequence; returns what is missing of it."""
        same = self.common(tokens)
        if self.engine.length(self.number) != same or len(self.tokens) != same:
            self.tokens = self.tokens[:same]
            if self.engine.length(self.number) != same:
                self.engine.truncate(self.number, same)
        self.hold(tokens)
        return tokens[same:]


def check_prompt(tokens: Sequence[int] | Tokens, vocabulary: int, context: int, longest: int | None = None) -> Tokens:
    """A prompt as the engine takes it, or the sentence that says what is wrong with it.

    `longest` is the longest context that the model could be loaded with.
    """
    prompt = np.asarray(tokens)
    if prompt.ndim == 2 and len(prompt) == 1:
        prompt = prompt[0]
    if prompt.ndim != 1 or (prompt.size and not np.issubdtype(prompt.dtype, np.integer)):
        raise LowbitError(
            f"a prompt is text or one list of token numbers, not an array {list(prompt.shape)} of {prompt.dtype}"
        )
    if not prompt.size:
        raise LowbitError("the prompt is empty: give the model some text to answer")
    outside = prompt[(prompt < 0) | (prompt >= vocabulary)]
    if outside.size:
        raise LowbitError(
            f"token {int(outside[0])} is outside the vocabulary of {vocabulary}: is the tokenizer that of another model?"
        )
    if len(prompt) >= context:
        longer = longest is not None and longest > len(prompt)
        raise LowbitError(
            f"the prompt has {len(prompt)} tokens and leaves no room for an answer in a context of {context}: "
            f"shorten it{f', or load the model with a longer one, up to {longest} (context=, --context)' if longer else ''}"
        )
    return prompt.astype(np.int32)


def check_window(length: int, window: int | None) -> None:
    """Refuse a prompt whose last token would not see its first in layers with a sliding window."""
    if window is not None and length > window:
        raise LowbitError(
            f"the prompt has {length} tokens and the model's sliding window shows {window}: shorten it, or leave out "
            "within_window (--within-window), and layers with that window forget its beginning"
        )
