"""Every family, as data: the spec of a tiny random model, interpreted in numpy, gives the logits of transformers."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from lowbit.models.families import FAMILIES, spec_from_config
from lowbit.models.rope import alibi_slopes, inverse_frequencies
from lowbit.models.spec import DecoderSpec
from unit.family_cases import CASES, TOLERANCE, arrays, prompt, reference_logits, tiny_model
from unit.spec_interpreter import decoder_logits


@pytest.fixture(params=CASES, ids=lambda name: name.replace(", ", "-").replace(" ", "_"))
def case(request: pytest.FixtureRequest) -> Iterator[tuple[PreTrainedModel, DecoderSpec]]:
    model_type, fields = CASES[request.param]
    # transformers adds Falcon's ALiBi twice in its eager attention, once in the other one
    model = tiny_model(model_type, fields, "sdpa" if fields.get("alibi") else "eager")
    yield model, spec_from_config(model.config.to_dict())


def test_interpreted_spec_gives_the_logits_of_transformers(case: tuple[PreTrainedModel, DecoderSpec]) -> None:
    model, spec = case
    expected = reference_logits(model)
    error = np.abs(decoder_logits(spec, arrays(model), prompt()) - expected).max()
    assert np.abs(expected).max() > 0.1
    assert error < TOLERANCE


def test_every_family_has_a_case() -> None:
    assert {model_type for model_type, _ in CASES.values()} == set(FAMILIES)


# One switch turned off, or another way, and where: the logits must notice.
SWITCHES: dict[str, tuple[str, Callable[[DecoderSpec], DecoderSpec]]] = {
    "norm kind": ("gpt2", lambda s: replace(s, norm=replace(s.norm, kind="rms"))),
    "norm offset": ("gemma", lambda s: replace(s, norm=replace(s.norm, offset=0.0))),
    "placement": ("opt, norms after", lambda s: replace(s, placement="pre")),
    "parallel": ("gpt_neox", lambda s: replace(s, residual="sequential")),
    "shared norm": ("falcon, two norms", lambda s: replace(s, residual="parallel_shared")),
    "residual multiplier": ("granite", lambda s: replace(s, residual_multiplier=1.0)),
    "embedding multiplier": ("granite", lambda s: replace(s, embedding=replace(s.embedding, multiplier=1.0))),
    "embedding norm": ("bloom", lambda s: replace(s, embedding=replace(s.embedding, norm=False))),
    "position offset": ("opt", lambda s: replace(s, embedding=replace(s.embedding, position_offset=0))),
    "logits multiplier": ("cohere", lambda s: replace(s, head=replace(s.head, multiplier=1.0))),
    "logits cap": ("gemma2", lambda s: replace(s, head=replace(s.head, soft_cap=None))),
    "scale": ("granite", lambda s: replace(s, attention=replace(s.attention, scale=10**-0.5))),
    "attention cap": ("gemma2", lambda s: replace(s, attention=replace(s.attention, soft_cap=None))),
    "qk norm": ("qwen3", lambda s: replace(s, attention=replace(s.attention, qk_norm="none"))),
    "qkv layout": ("bloom", lambda s: replace(s, attention=replace(s.attention, qkv="concatenated"))),
    "alibi": ("mpt", lambda s: replace(s, attention=replace(s.attention, alibi=()))),
    "clip": ("olmo", lambda s: replace(s, attention=replace(s.attention, clip=None))),
    "sinks": ("gpt_oss", lambda s: replace(s, attention=replace(s.attention, sinks=False))),
    "rope": ("smollm3", lambda s: replace(s, layers=(s.layers[0],) * len(s.layers))),
    "pairing": ("cohere", lambda s: with_rope(s, pairing="halves")),
    "attention factor": ("llama, rope yarn", lambda s: with_rope(s, attention_factor=1.0)),
    "window": ("mistral", lambda s: replace(s, layers=tuple(replace(layer, window=8) for layer in s.layers))),
    "normalize": ("qwen3_moe", lambda s: replace(s, experts=replace(s.experts, normalize=False))),
    "shared expert": ("qwen2_moe", lambda s: replace(s, experts=replace(s.experts, shared=None))),
    "limit": (
        "gpt_oss",
        lambda s: replace(s, experts=replace(s.experts, expert=replace(s.experts.expert, limit=None))),
    ),
    "activation": ("gpt_neox", lambda s: replace(s, mlp=replace(s.mlp, activation="relu"))),
}


def with_rope(spec: DecoderSpec, **changes: Any) -> DecoderSpec:
    return replace(spec, layers=tuple(replace(layer, rope=replace(layer.rope, **changes)) for layer in spec.layers))


@pytest.mark.parametrize("switch", SWITCHES)
def test_every_switch_matters(switch: str) -> None:
    name, turn = SWITCHES[switch]
    model = tiny_model(*CASES[name])
    spec = spec_from_config(model.config.to_dict())
    assert turn(spec) != spec
    right, wrong = (decoder_logits(s, arrays(model), prompt()) for s in (spec, turn(spec)))
    assert np.abs(right - wrong).max() > 10 * TOLERANCE


@pytest.mark.parametrize("name", [name for name in CASES if "rope" in name or "partial" in name])
def test_frequencies_are_those_of_transformers(name: str) -> None:
    model = tiny_model(*CASES[name])
    rope = spec_from_config(model.config.to_dict()).layers[0].rope
    assert rope is not None
    rotary = model.model.rotary_emb
    expected = rotary.inv_freq.numpy()
    length = 1 if rope.kind == "longrope" else rope.trained_positions
    np.testing.assert_allclose(inverse_frequencies(rope, length), expected, rtol=3e-6)
    assert rope.attention_factor == pytest.approx(rotary.attention_scaling)


@pytest.mark.parametrize("heads", [1, 2, 3, 6, 8, 12, 71])
def test_alibi_slopes_are_those_of_bloom(heads: int) -> None:
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    alibi = build_alibi_tensor(torch.ones(1, 2), heads, torch.float64)
    np.testing.assert_allclose(alibi_slopes(heads), alibi[:, 0, 1], rtol=1e-6)
