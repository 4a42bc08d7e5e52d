"""The loop that makes an answer, token by token.

    logits = slot.advance(tokens so far)  ->  token = selector.choose(logits)  ->  text, until something ends it

Guessing ahead: if a guess of the next tokens is at hand (from the prompt itself, or from a small model), one step
reads them all, which costs little more than reading one, since the weights are read once. Each token is still chosen
from its own logits, in order and with the same random numbers; the guesses that agree with the choices have saved
their steps, the first that does not ends the round. So an answer is the same with and without guesses, drawn or not.

Everything here is a generator: who stops reading stops the work, and closing it at any point leaves the engine ready
for the next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from lowbit.runtime.selection import Selector
from lowbit.runtime.settings import Settings
from lowbit.runtime.slots import Floats, Slot, Tokens
from lowbit.runtime.text import StopStrings, TextPieces, Tokenizer

Finish = Literal["stop", "length"]
# Tokens that may follow the ones so far, and how many at most.
Guess = Callable[[Tokens, int], Sequence[int]]


@dataclass(frozen=True)
class Chosen:
    """A token, and on request how likely it was: natural logarithms, of the plain distribution before any setting."""

    token: int
    log_probability: float | None = None
    alternatives: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Piece:
    """What came with one token. The text may be empty (half a character) or end before the token does (a stop string)."""

    text: str
    chosen: Chosen
    finish: Finish | None = None

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Answer:
    """What a model said. `tokens` includes the one that ended it; the text does not."""

    text: str
    tokens: tuple[int, ...]
    finish: Finish
    prompt_tokens: int
    chosen: tuple[Chosen, ...] = ()
    score: float | None = None

    def __str__(self) -> str:
        return self.text


def choose_tokens(slot: Slot, prompt: Tokens, settings: Settings, guess: Guess | None = None) -> Iterator[Chosen]:
    """Tokens that continue a prompt, until one ends the answer or the room is used up."""
    ends = settings.ends
    selector = Selector(settings.selection, ends)
    room = min(settings.max_new_tokens, slot.engine.context - len(prompt))
    tokens = np.concatenate([prompt, np.empty(room, np.int32)])
    made, last = len(prompt), len(prompt) + room
    while made < last:
        so_far = tokens[:made]
        guesses = list(guess(so_far, slot.guesses_after(so_far, last - made - 1))) if guess is not None else []
        for logits, guessed in zip(slot.advance_over(so_far, guesses), [*guesses, None], strict=True):
            token = selector.choose(logits, tokens[:made])
            tokens[made] = token
            made += 1
            yield _with_probabilities(token, logits, settings.log_probabilities)
            if token in ends:
                return
            if token != guessed:
                break


def answer_pieces(chosen: Iterator[Chosen], tokenizer: Tokenizer, settings: Settings, room: int) -> Iterator[Piece]:
    """The text of tokens as they come. `room` tokens are all there may be."""
    pieces, stops = TextPieces(tokenizer.decode), StopStrings(settings.stop)
    for count, choice in enumerate(chosen, 1):
        ended = choice.token in settings.ends
        text = stops.add(pieces.rest() if ended else pieces.add(choice.token))
        if stops.found is None and not ended and count < room:
            yield Piece(text, choice)
            continue
        if stops.found is None:
            text += stops.add(pieces.rest())
        if stops.found is None:
            text += stops.rest()
        yield Piece(text, choice, "stop" if ended or stops.found is not None else "length")
        return


def join(pieces: Iterator[Piece], prompt_tokens: int) -> Answer:
    """All pieces of an answer as one."""
    everything = list(pieces)
    chosen = tuple(piece.chosen for piece in everything)
    text = "".join(piece.text for piece in everything)
    return Answer(text, tuple(c.token for c in chosen), everything[-1].finish or "length", prompt_tokens, chosen)


def _with_probabilities(token: int, logits: Floats, count: int | None) -> Chosen:
    if count is None:
        return Chosen(token)
    scores = log_softmax(logits)
    best = np.argsort(-scores, kind="stable")[:count]
    return Chosen(token, float(scores[token]), tuple((int(t), float(scores[t])) for t in best))


def log_softmax(logits: Floats) -> Floats:
    """log(exp(x) / sum exp(x)) along the last axis, in fp32 with the sum in fp64."""
    shifted = logits - logits.max(-1, keepdims=True)
    total = np.log(np.exp(shifted).sum(-1, keepdims=True, dtype=np.float64))
    scores: Floats = (shifted - total).astype(np.float32)
    return scores
