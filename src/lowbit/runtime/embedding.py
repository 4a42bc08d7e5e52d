"""The state of a model behind a text, as one vector: for search and comparison.

    vector = mean over tokens of h, or h of the last token;  h = final norm of the last layer, divided by its length on request

The engine gives logits = head @ h, so a second engine over the same weights takes the identity for its head and gives h itself. The
identity has as many rows as the vocabulary, all but the first few of them zero: pages that nobody wrote take no memory.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np

from lowbit.errors import RecipeError
from lowbit.models.spec import DecoderSpec, HeadSpec
from lowbit.runtime.engine import Engine
from lowbit.runtime.slots import Floats, Tokens
from lowbit.runtime.weights import EngineWeights, plain

Pooling = Literal["mean", "last"]


class Embedder:
    """States instead of logits, from the weights of a model that is loaded already."""

    def __init__(self, spec: DecoderSpec, weights: EngineWeights, context: int, cache: str, compute: str) -> None:
        self.width = spec.embedding.width
        head = np.zeros((spec.vocab_size, self.width), np.float16)
        np.fill_diagonal(head[: self.width], 1)
        matrices = weights.matrices | {("head", None): plain(head)}
        stated = dataclasses.replace(spec, head=HeadSpec(tied=False, final_norm=spec.head.final_norm))
        self.engine = Engine(stated, EngineWeights(matrices, weights.vectors), context, cache, 1, compute)

    def states(self, tokens: Tokens) -> Floats:
        """h of every token, [tokens, width]."""
        self.engine.reset()
        return self.engine.logits(tokens)[:, : self.width]

    def embed(self, tokens: Tokens, pooling: Pooling = "mean", normalize: bool = True) -> Floats:
        """One vector [width] for a text."""
        if pooling not in ("mean", "last"):
            raise RecipeError(f"pooling={pooling!r} is unknown; use 'mean' or 'last'")
        states = self.states(tokens)
        vector = states.mean(0) if pooling == "mean" else states[-1].copy()
        return np.asarray(vector / np.linalg.norm(vector) if normalize else vector, np.float32)
