"""The logits of a text by a model of any size, with a few of its layers in memory at a time.

    logits = staged_logits(read_weights(files, spec), spec, tokens)          # [tokens, vocabulary], in float32

An engine runs some of the layers over the states of the tokens, an engine of the next ones goes on from there:

    first stage      the tokens' embeddings and layers 0 to n; the head is the identity
    further ones     token i is row i of the states before; what a family does to embeddings has been done
    last stage       the model's own head

Weights are taken as they come, laid out for one stage, and given back behind it, pages of their file too. Nothing is kept, so this
is the way to ask a model one question: a plain 1.1 B answers one of 48 tokens in 400 MB.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from itertools import groupby

import numpy as np

from lowbit.models.spec import DecoderSpec, EmbeddingSpec, HeadSpec
from lowbit.runtime.engine import Engine
from lowbit.runtime.files import Loaded
from lowbit.runtime.loading import lay_out
from lowbit.runtime.mapped import mapped_bytes, release_pages
from lowbit.runtime.stored import Dense
from lowbit.runtime.weights import Floats, plain

# Bytes of the layers of a stage, if their weights have 16 bits.
_AT_ONCE = 256 << 20
_WAY_OUT = ("final_norm", "head_in", "head")
_OUTER = -1


def staged_logits(
    weights: Iterable[Loaded], spec: DecoderSpec, tokens: Sequence[int], at_once: int = _AT_ONCE
) -> Floats:
    """What a model says after each of some tokens, as many as its context holds. Weights outside the layers come first."""
    count = _layers_at_once(spec, len(tokens), at_once)
    outer: list[Loaded] = []
    states: Floats | None = None
    for number, group in groupby(weights, lambda read: _OUTER if read.layer is None else read.layer // count):
        if number == _OUTER:
            outer = list(group)
            continue
        layers, inside = range(number * count, min((number + 1) * count, len(spec.layers))), list(group)
        states = _run(spec, layers, inside, outer, tokens, states)
        _release(inside)
    _release(outer)
    assert states is not None, "a model has layers"
    return states


def _layers_at_once(spec: DecoderSpec, tokens: int, at_once: int) -> int:
    """Layers of a stage; all of them where states and tokens do not fit a head and a table of the vocabulary's size."""
    whole = len(spec.layers)
    if spec.embedding.width != spec.hidden_size or spec.vocab_size < max(tokens, spec.hidden_size):
        return whole
    largest = max(2 * sum(math.prod(weight.shape) for weight in spec.layer_weights(layer)) for layer in range(whole))
    return max(1, min(at_once // largest, whole))


def _run(
    spec: DecoderSpec,
    layers: range,
    read: list[Loaded],
    outer: list[Loaded],
    tokens: Sequence[int],
    states: Floats | None,
) -> Floats:
    """The states, or at last the logits, behind these layers."""
    begins, ends = states is None, layers.stop == len(spec.layers)
    inside = [dataclasses.replace(loaded, layer=(loaded.layer or 0) - layers.start) for loaded in read]
    table_is_head = ends and spec.head.tied
    wanted = [w for w in outer if (ends if w.role in _WAY_OUT else begins or (table_is_head and w.role == "embedding"))]
    ready = lay_out([*wanted, *inside], spec)
    stage = dataclasses.replace(spec, layers=spec.layers[layers.start : layers.stop])
    if not begins and not ends:
        # A vocabulary of states alone: the identity of all tokens would be as much work as the layers of a stage.
        stage = dataclasses.replace(stage, vocab_size=max(spec.hidden_size, len(tokens)))
    if not ends:
        # Rows that nobody writes are pages that take no memory.
        ready.matrices["head", None] = plain(np.eye(stage.vocab_size, spec.hidden_size, dtype=np.float16))
        stage = dataclasses.replace(stage, head=HeadSpec(tied=False, final_norm=False))
    if states is not None:
        if table_is_head:
            ready.matrices["head", None] = ready.matrices["embedding", None]
        table = np.zeros((stage.vocab_size, spec.hidden_size), np.float32)
        table[: len(tokens)] = states
        ready.matrices["embedding", None] = plain(table)
        stage = dataclasses.replace(
            stage,
            embedding=EmbeddingSpec(width=spec.hidden_size),
            head=dataclasses.replace(stage.head, tied=False),
        )
        tokens = range(len(tokens))
    with Engine(stage, ready, len(tokens), cache="fp32", compute="fp32") as engine:
        found = engine.logits(tokens)
    return found if ends else np.ascontiguousarray(found[:, : spec.hidden_size])


def _release(weights: Iterable[Loaded]) -> None:
    """Give back the pages that an engine has read since the reader of the file did so."""
    for loaded in weights:
        if isinstance(loaded.weight, Dense) and mapped_bytes(loaded.weight.array):
            release_pages(loaded.weight.array)
