"""Probabilities over an int8 cache have 14 bits where a key takes nearly all of a tile and 8 where none does, and no row minds
which its neighbours have.

The model is made by hand: a query scores the first token as its head likes and all others nothing, and the first token's value is
zero, so that what a head sees is what the others have beside it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from cpu.test_core import every_instruction_set
from cpu.test_engine import relative
from lowbit.core import calls
from lowbit.models.families import spec_from_config
from lowbit.runtime.engine import Engine
from lowbit.runtime.weights import engine_weights
from unit.family_cases import CASES, arrays, tiny_model

HEADS, HEAD_DIM, HIDDEN, CONTEXT = 4, 64, 48, 320
SINK, FLAG, ALWAYS = 0, 0, 1  # a token; the coordinate that only it has, and the one that all others have
SLOW = HEAD_DIM // 2 - 1  # the channel that positions turn least
FLAT, SOME, NEARLY_ALL = 0.0, 3.0, 6.0
# What rounding to whole shares costs, by score. Beside the first key others have 255 shares of one byte each (127 on AVX2), then
# 13 of them, then 40 of two; up to half a share is lost, and a key whose value is small has fewer. With one byte the last would
# have half a share each.
ROUNDED = {FLAT: 0.01, SOME: 0.05, NEARLY_ALL: 0.04}
PROMPT = [SINK, *(1 + np.random.default_rng(5).integers(0, 130, 300)).tolist()]


@pytest.fixture(params=every_instruction_set())
def chosen(request: pytest.FixtureRequest) -> Iterator[str]:
    calls.set_instruction_set(request.param)
    yield request.param
    calls.set_instruction_set(None)


def model_with(
    scores: tuple[float, ...], seen: tuple[int, ...] = tuple(range(HEADS))
) -> tuple[Any, dict[str, NDArray[Any]]]:
    """A layer of attention whose heads score the first token as given, and whose output is that of the heads in `seen`."""
    model_type, fields = CASES["llama"]
    sizes = {"hidden_size": HIDDEN, "num_attention_heads": HEADS, "num_key_value_heads": 1, "head_dim": HEAD_DIM}
    made = tiny_model(model_type, {**fields, **sizes, "num_hidden_layers": 1, "max_position_embeddings": CONTEXT})
    weights = {name: np.array(array) for name, array in dict(arrays(made)).items()}
    random = np.random.default_rng(7)
    embedding = random.normal(size=(131, HIDDEN)).astype(np.float32)
    embedding[:, FLAG], embedding[:, ALWAYS] = 0.0, 1.0
    embedding[SINK] = 0.0
    embedding[SINK, FLAG] = np.sqrt(HIDDEN)
    layer = "model.layers.0."
    query, key, value = (np.zeros_like(weights[f"{layer}self_attn.{name}_proj.weight"]) for name in "qkv")
    for head, score in enumerate(scores):
        query[head * HEAD_DIM + SLOW, ALWAYS] = score
    key[SLOW, FLAG] = np.sqrt(HEAD_DIM / HIDDEN)
    value[:, ALWAYS + 1 :] = random.normal(size=(HEAD_DIM, HIDDEN - ALWAYS - 1))
    output = np.zeros((HIDDEN, HEADS, HEAD_DIM), dtype=np.float32)
    for head in seen:  # each far above what does not pass through attention
        output[:, head] = random.normal(size=(HIDDEN, HEAD_DIM)) * np.exp(scores[head])
    weights |= {f"{layer}self_attn.{name}_proj.weight": x for name, x in zip("qkv", (query, key, value), strict=True)}
    weights[f"{layer}self_attn.o_proj.weight"] = output.reshape(HIDDEN, -1)
    weights[f"{layer}mlp.down_proj.weight"] *= 0
    weights["model.embed_tokens.weight"] = weights["lm_head.weight"] = embedding
    weights |= {name: np.ones_like(array) for name, array in weights.items() if array.ndim == 1}
    return spec_from_config(made.config.to_dict()), weights


def logits(made: tuple[Any, dict[str, NDArray[Any]]], cache: str) -> NDArray[np.float32]:
    with Engine(made[0], engine_weights(*made), CONTEXT, cache=cache, compute="fp32") as engine:
        return engine.logits(PROMPT)


@pytest.mark.parametrize("score", ROUNDED)
def test_what_is_beside_a_key_that_takes_nearly_all_is_kept(chosen: str, score: float) -> None:
    made = model_with((score,) * HEADS, seen=(0,))
    assert relative(logits(made, "int8")[1:], logits(made, "fp32")[1:]) < ROUNDED[score]


def test_a_row_is_the_same_whatever_bits_its_neighbours_have(chosen: str) -> None:
    for score in ROUNDED:
        alone, *beside = (
            logits(model_with((score, *others), seen=(0,)), "int8")
            for others in ((score,) * 3, (FLAT, NEARLY_ALL, FLAT), (NEARLY_ALL, SOME, NEARLY_ALL))
        )
        assert all(np.array_equal(alone, found) for found in beside)
