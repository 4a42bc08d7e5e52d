"""Prompts over an int8 cache on register tiles: the same whole numbers as the lanes give, so the same logits to the last bit.

Sets with tiles differ from their lanes in the two products of attention and in nothing else, as long as the weights are floats:
their folded products of low-bit weights are compared in test_folded.py. A single token has too few rows for tiles, so that what a
set with tiles decodes token by token comes from the lanes, and is held against its own prompt.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from cpu.test_core import sets_here
from cpu.test_engine import CACHE_TOLERANCE, ids, relative
from cpu.test_folded import PLAIN
from lowbit.core import calls
from lowbit.errors import KernelError
from lowbit.models.families import spec_from_config
from lowbit.runtime.engine import Engine
from lowbit.runtime.weights import engine_weights
from unit.family_cases import CASES, arrays, tiny_model
from unit.spec_interpreter import decoder_logits

Model = tuple[Any, Any]
# A row more than a tile has; as many as pass over the keys together; more keys than share a softmax; more than a chunk.
PROMPTS = (17, 48, 130, 513)
CONTEXT = 520


def model(case: str, **changes: Any) -> Model:
    model_type, fields = CASES[case]
    made = tiny_model(model_type, {**fields, "max_position_embeddings": CONTEXT, "num_hidden_layers": 2, **changes})
    return spec_from_config(made.config.to_dict()), dict(arrays(made))


def set_lanes() -> None:
    """What the stand-in for tiles is built upon: the best lanes here, or the portable ones."""
    try:
        calls.set_instruction_set("avx512")
    except KernelError:
        calls.set_instruction_set("portable")


@pytest.fixture(params=sets_here(PLAIN))
def tiles(request: pytest.FixtureRequest) -> Iterator[str]:
    yield request.param
    calls.set_instruction_set(None)


def both(tiles: str, made: Model, pieces: list[list[int]]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Logits of a prompt given in pieces, on tiles and on lanes."""
    results = []
    for choose in (lambda: calls.set_instruction_set(tiles), set_lanes):
        choose()
        with Engine(made[0], engine_weights(*made), CONTEXT, cache="int8", compute="fp32") as engine:
            results.append(np.concatenate([engine.logits(piece) for piece in pieces]))
    return results[0], results[1]


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (3, 1), (4, 1), (8, 1)])
def test_prompts_of_every_shape_are_the_lanes_to_the_bit(tiles: str, heads: int, kv_heads: int, head_dim: int) -> None:
    sizes = {"hidden_size": 48, "num_attention_heads": heads, "num_key_value_heads": kv_heads}
    made = model("llama", head_dim=head_dim, **sizes)
    for count in PROMPTS:
        on_tiles, on_lanes = both(tiles, made, [ids(count)])
        assert np.isfinite(on_tiles).all()
        assert np.array_equal(on_tiles, on_lanes), count


@pytest.mark.parametrize(
    ("case", "changes"),
    [
        ("gemma2", {"head_dim": 64, "sliding_window": 37}),
        ("gpt_oss", {"head_dim": 64, "sliding_window": 37}),
        ("mpt", {"hidden_size": 128, "num_attention_heads": 2, "max_seq_len": CONTEXT}),
        ("llama", {"head_dim": 48, "num_attention_heads": 20, "num_key_value_heads": 1}),
        ("llama", {"head_dim": 50, "num_attention_heads": 5, "num_key_value_heads": 1}),
    ],
)
def test_masks_caps_sinks_and_slopes_stay_with_the_lanes(tiles: str, case: str, changes: dict[str, Any]) -> None:
    """In pieces too, so that keys begin and end anywhere. Heads of 50 are padded to 64; heads of 48 stay with the lanes."""
    made = model(case, **changes)
    prompt = ids(300)
    on_tiles, on_lanes = both(tiles, made, [prompt[:101], prompt[101:230], prompt[230:]])
    assert np.array_equal(on_tiles, on_lanes)


def test_tiles_are_near_exact_attention_and_near_what_is_decoded(tiles: str) -> None:
    made = model("llama", head_dim=64)
    expected = decoder_logits(*made, ids(150))
    calls.set_instruction_set(tiles)
    with Engine(made[0], engine_weights(*made), CONTEXT, cache="int8", compute="fp32") as engine:
        assert relative(engine.logits(ids(150)), expected) < CACHE_TOLERANCE["int8"]
        engine.reset()
        engine.prefill(ids(150)[:-8])
        last = np.stack([engine.decode(token) for token in ids(150)[-8:]])
        assert relative(last, expected[-8:]) < CACHE_TOLERANCE["int8"]
