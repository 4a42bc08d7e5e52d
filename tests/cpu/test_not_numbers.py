"""Numbers that are none: wherever a NaN enters the engine, the step ends in a sentence and never in logits.

Maxima are where one gets lost: of scores before the softmax, of a key before it is rounded to bytes, of zero and what an
activation is given. So every place is tried with every cache, on every instruction set, and within a chunk as well as
token by token.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from cpu.test_core import every_instruction_set
from lowbit.core import calls
from lowbit.errors import KernelError
from lowbit.formats import as_format
from lowbit.grid import quantize
from lowbit.models.families import spec_from_config
from lowbit.runtime.engine import Engine
from lowbit.runtime.weights import EngineWeights, engine_weights
from unit.family_cases import CASES, arrays, tiny_model

PROMPT = [int(token) for token in np.random.default_rng(3).integers(5, 131, 20)]
# Heads of 64 channels meet tiles of bytes.
WIDE = "llama, heads of 64"
MESSAGE = "the logits are not numbers"


@pytest.fixture(params=every_instruction_set(), autouse=True)
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    calls.set_instruction_set(request.param)
    yield request.param
    calls.set_instruction_set(None)


def weights_of(case: str, format: str | None = None) -> tuple[Any, EngineWeights]:
    model_type, fields = ("llama", CASES["llama"][1] | {"head_dim": 64}) if case == WIDE else CASES[case]
    model = tiny_model(model_type, fields)
    spec = spec_from_config(model.config.to_dict())
    tensors: dict[str, Any] = {name: np.array(array) for name, array in arrays(model).items()}
    for name, array in tensors.items():
        if format and array.ndim == 2:
            packed = quantize(torch.from_numpy(array), as_format(format))
            tensors[name] = packed.with_tensors({part: t.numpy() for part, t in packed.tensors().items()})
    return spec, engine_weights(spec, tensors)


def expect_refusals(engine: Engine) -> None:
    with pytest.raises(KernelError, match=MESSAGE):
        engine.prefill(PROMPT)
    with pytest.raises(KernelError, match=MESSAGE):
        engine.decode(PROMPT[0])
    assert engine.length() == 0


@pytest.mark.parametrize("cache", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("role", ["q", "k", "v"])
@pytest.mark.parametrize("case", ["llama", WIDE, "gemma2", "mpt, clipped", "qwen3"])
def test_one_channel_of_every_query_key_or_value(case: str, role: str, cache: str) -> None:
    """Of the last layer, so that nothing but its attention sees it; with caps, ALiBi, clipping, norms of heads."""
    spec, weights = weights_of(case)
    last = max(layer for _, layer in weights.matrices if layer is not None)
    fused = weights.matrices.get(("qkv", last))
    array = (fused or weights.matrices[role, last]).owner
    array[(("q", "k", "v").index(role) * len(array) // 3 if fused else 0) + 1, 2] = np.nan
    with Engine(spec, weights, 64, cache=cache, compute="fp32") as engine:
        expect_refusals(engine)


@pytest.mark.parametrize("cache", ["fp32", "fp16", "int8"])
def test_one_token_of_a_prompt_reaches_all_that_follow(cache: str) -> None:
    spec, weights = weights_of("llama, biases, wide heads")
    bad = next(token for token in range(5, 131) if token not in PROMPT)
    weights.matrices["embedding", None].owner[bad, 7] = np.nan
    with Engine(spec, weights, 64, cache=cache, compute="fp32") as engine:
        with pytest.raises(KernelError, match=MESSAGE):
            engine.prefill([*PROMPT[:3], bad, *PROMPT[3:]])
        assert np.isfinite(engine.prefill(PROMPT)).all()  # what the failed step left behind disturbs nobody
        for token in [*PROMPT, bad, *PROMPT][:24]:
            if token == bad:
                with pytest.raises(KernelError, match=MESSAGE):
                    engine.decode(token)
            else:
                assert np.isfinite(engine.decode(token)).all()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_keys_beyond_what_the_cache_can_hold(value: float) -> None:
    """65504 is the most of fp16; a key that is not a number must not count as one that nobody looks at."""
    spec, weights = weights_of("llama, biases, wide heads")
    bias = weights.matrices["k", 2].bias
    assert bias is not None
    bias[3] = -1e6 if value == np.inf else value
    with Engine(spec, weights, 64, cache="fp16", compute="fp32") as engine:
        expect_refusals(engine)


@pytest.mark.parametrize(
    "case", ["llama", "gpt2", "gpt2, narrow", "gpt_neox", "gemma", "gpt_oss", "mixtral", "bloom"], ids=str
)
def test_what_activations_are_given(case: str) -> None:
    """SiLU, GELU in both forms, ReLU, the clipped one of gpt-oss; in experts too."""
    spec, weights = weights_of(case)
    last = max(layer for _, layer in weights.matrices if layer is not None)
    names = [role for role, layer in weights.matrices if layer == last and ("gate" in role or "up" in role)]
    weights.matrices[names[0], last].owner[..., 1, 2] = np.nan
    with Engine(spec, weights, 64, cache="fp32", compute="fp32") as engine:
        expect_refusals(engine)


@pytest.mark.parametrize("format", ["int4_g32", "nf4_g32", "int8_channel"])
def test_activations_that_are_rounded(format: str) -> None:
    spec, weights = weights_of("llama", format)
    norm, _ = weights.vectors["mlp_norm", 2]
    assert norm is not None
    norm[5] = np.nan
    with Engine(spec, weights, 64, cache="int8", compute="int8") as engine:
        expect_refusals(engine)
