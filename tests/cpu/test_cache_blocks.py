"""A prompt's keys and values go into the int8 cache sixteen positions at once where they are a block of it, and one by one
elsewhere: every byte and every scale is the same, of numbers that are none too.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from cpu.test_core import every_instruction_set
from lowbit.core import calls
from lowbit.models.families import spec_from_config
from lowbit.runtime.engine import Engine
from lowbit.runtime.weights import engine_weights
from unit.family_cases import CASES, arrays, tiny_model

PIECES = (41, 19, 30)  # blocks of 16 that are not filled at once: those from 32 and 48
NO_NUMBER, INFINITE = 5, 7  # tokens; where they stand no piece's last token sees them, for its logits would be none
PROMPT = np.random.default_rng(3).integers(10, 130, sum(PIECES))
PROMPT[[17, 44, 61, 62]] = NO_NUMBER, INFINITE, NO_NUMBER, INFINITE
WINDOW = 7


@pytest.fixture(params=every_instruction_set())
def chosen(request: pytest.FixtureRequest) -> Iterator[str]:
    calls.set_instruction_set(request.param)
    yield request.param
    calls.set_instruction_set(None)


@pytest.mark.parametrize("head_dim", [64, 80, 24])
def test_blocks_are_what_single_positions_are(chosen: str, head_dim: int) -> None:
    model_type, fields = CASES["mistral"]
    made = tiny_model(model_type, {**fields, "head_dim": head_dim, "num_hidden_layers": 1, "sliding_window": WINDOW})
    weights = {name: np.array(array) for name, array in dict(arrays(made)).items()}
    embedding = weights["model.embed_tokens.weight"]
    embedding[NO_NUMBER, 3], embedding[INFINITE, 3] = np.nan, np.inf
    spec = spec_from_config(made.config.to_dict())
    with Engine(spec, engine_weights(spec, weights), 96, cache="int8", compute="fp32", slots=2) as engine:
        engine.prefill(PROMPT)
        for piece in np.split(PROMPT, np.cumsum(PIECES[:-1])):
            engine.prefill(piece, slot=1)
        whole, pieces = engine.save(0), engine.save(1)
    assert whole.size > 2 * (sum(PIECES) - 16) * head_dim  # what is far before the window was dropped
    assert np.array_equal(whole, pieces)
