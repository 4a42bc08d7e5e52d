"""From GGUF metadata to Hugging Face's config.json and generation_config.json.

The sizes are rows of `models.gguf_names`; here are the few things that take a thought: rotary embeddings and what
some families add. Rotary frequencies are theta^(-2i/d) for i < d/2, optionally scaled. Llama 3's scaling is not
stored as its parameters but as the d/2 factors themselves (tensor `rope_freqs`), so its parameters are recovered
from them and checked against them. Keys are written in the form that every transformers since 4.40 reads
(`rope_theta`, `rope_scaling`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from lowbit.errors import CheckpointError
from lowbit.interop.gguf_container import Container, decode_blocks
from lowbit.models.gguf_names import FAMILIES, ConfigRow, GgufFamily

Floats = npt.NDArray[Any]

WITHOUT_ROPE = ("gpt2", "bloom", "mpt")
# Llama 3 as published; all its derivatives keep these two, and differ in factor and context.
LOW_FREQUENCY, HIGH_FREQUENCY = 1.0, 4.0
# The 27B members of Gemma 2 and 3, told by their depth, scale queries by hidden / heads and not by head_dim.
GEMMA_27B_LAYERS = {"gemma2": 46, "gemma3_text": 62}
# Yarn's parameters, and what config.json calls them.
YARN_KEYS = {
    "rope.scaling.original_context_length": "original_max_position_embeddings",
    "rope.scaling.yarn_attn_factor": "attention_factor",
    "rope.scaling.yarn_beta_fast": "beta_fast",
    "rope.scaling.yarn_beta_slow": "beta_slow",
}
SAMPLING_KEYS = {
    "general.sampling.temp": "temperature",
    "general.sampling.top_k": "top_k",
    "general.sampling.top_p": "top_p",
    "general.sampling.min_p": "min_p",
    "general.sampling.penalty_repeat": "repetition_penalty",
}
END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")


def find_family(container: Container) -> GgufFamily:
    """The row of the table that describes this file, or an error that lists the rows there are."""
    architecture = container.require("general.architecture")
    for family in FAMILIES:
        if family.architecture == architecture and (not family.when or _source(container, family.when)):
            return family
    known = ", ".join(sorted({family.architecture for family in FAMILIES}))
    raise CheckpointError(
        f"{container.path} is of the architecture '{architecture}', which cannot be read yet; known are {known}"
    )


def token_ids(container: Container) -> dict[str, int | None]:
    """The beginning, end and padding tokens, None where the file names none."""
    names = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "pad_token_id": "padding_token_id"}
    return {key: container.metadata.get(f"tokenizer.ggml.{name}") for key, name in names.items()}


def build_config(container: Container, family: GgufFamily) -> dict[str, Any]:
    """config.json of the model."""
    embedding = container.entries.get("token_embd.weight")
    if embedding is None:
        raise CheckpointError(f"{container.path} has no tensor 'token_embd.weight': it holds no whole language model")
    config: dict[str, Any] = {
        "architectures": [family.model_class],
        "model_type": family.model_type,
        "vocab_size": embedding.shape[0],
        "tie_word_embeddings": "output.weight" not in container.entries,
        **token_ids(container),
        **{row.key: _row_value(container, row) for row in family.config},
        **family.constants,
    }
    _add_rope(container, config)
    addition = _ADDITIONS.get(family.model_type)
    if addition is not None:
        addition(container, config)
    return config


def build_generation_config(container: Container) -> dict[str, Any]:
    """generation_config.json: every token that ends an answer, and the publisher's sampling where stated."""
    config: dict[str, Any] = {key: value for key, value in token_ids(container).items() if value is not None}
    ends = [container.metadata.get(f"tokenizer.ggml.{key}") for key in END_KEYS]
    unique = list(dict.fromkeys(end for end in ends if end is not None))
    if len(unique) > 1:
        config["eos_token_id"] = unique
    sampling = {key: container.metadata[name] for name, key in SAMPLING_KEYS.items() if name in container.metadata}
    return config | ({"do_sample": True} | sampling if sampling else {})


def _row_value(container: Container, row: ConfigRow) -> Any:
    for source in row.source.split():
        value = _source(container, source)
        if value is not None:
            return value
    if row.default == "required":
        return container.require(_full_key(container, row.source.split()[0]))
    return row.default


def _source(container: Container, source: str) -> Any:
    kind, _, tensor = source.partition(":")
    match kind:
        case "has":
            return tensor in container.entries
        case "rows":
            entry = container.entries.get(tensor)
            return None if entry is None else entry.shape[-2]
    return container.metadata.get(_full_key(container, source))


def _full_key(container: Container, key: str) -> str:
    return f"{container.require('general.architecture')}.{key}"


def _get(container: Container, key: str, default: Any = None) -> Any:
    return container.metadata.get(_full_key(container, key), default)


def head_dim(container: Container) -> int:
    """The width of an attention head."""
    width = container.require(_full_key(container, "embedding_length"))
    heads = container.require(_full_key(container, "attention.head_count"))
    return int(_get(container, "attention.key_length", width // heads))


def _add_rope(container: Container, config: dict[str, Any]) -> None:
    if config["model_type"] in WITHOUT_ROPE:
        return
    config["rope_theta"] = float(_get(container, "rope.freq_base", 10000.0))
    rotated = _get(container, "rope.dimension_count")
    if rotated is not None and rotated != head_dim(container):
        # GPT-NeoX has its own word for it; both are the share of a head that rotates.
        key = "rotary_pct" if config["model_type"] == "gpt_neox" else "partial_rotary_factor"
        config[key] = rotated / head_dim(container)
    scaling = _rope_scaling(container, config)
    if scaling is not None:
        config["rope_scaling"] = scaling


def _rope_scaling(container: Container, config: dict[str, Any]) -> dict[str, Any] | None:
    long, short = _vector(container, "rope_factors_long.weight"), _vector(container, "rope_factors_short.weight")
    llama3 = _vector(container, "rope_freqs.weight")
    if long is not None and short is not None:
        return {"rope_type": "longrope", "long_factor": long.tolist(), "short_factor": short.tolist()}
    if llama3 is not None:
        return _recover_llama3(container, llama3, config)
    kind = _get(container, "rope.scaling.type", "none")
    factor = _get(container, "rope.scaling.factor", _get(container, "rope.scale_linear"))
    if kind in ("none", "longrope") and (factor is None or kind == "longrope"):
        return None
    if factor is None:
        raise CheckpointError(f"{container.path} names rope scaling '{kind}' but not its factor")
    if kind == "yarn":
        stated = {name: _get(container, key) for key, name in YARN_KEYS.items()}
        stated = {name: value for name, value in stated.items() if value is not None}
        return {"rope_type": "yarn", "factor": factor} | stated
    return {"rope_type": "linear", "factor": factor}


def _vector(container: Container, name: str) -> Floats | None:
    entry = container.entries.get(name)
    return None if entry is None else decode_blocks(entry.data, entry.type, "float32")


def _recover_llama3(container: Container, stored: Floats, config: dict[str, Any]) -> dict[str, Any] | None:
    """Llama 3's scaling from its factors: the largest, and the power of two as context that gives them all back."""
    factor = float(stored.max())
    if factor == 1.0:
        return None
    dim = 2 * stored.size
    wavelengths = 2 * math.pi * config["rope_theta"] ** (np.arange(0, dim, 2) / dim)
    for context in (2**power for power in range(9, 21)):
        smooth = np.clip((context / wavelengths - LOW_FREQUENCY) / (HIGH_FREQUENCY - LOW_FREQUENCY), 0, 1)
        expected = 1 / ((1 - smooth) / factor + smooth)
        if np.allclose(expected, stored, rtol=1e-3):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": LOW_FREQUENCY,
                "high_freq_factor": HIGH_FREQUENCY,
                "original_max_position_embeddings": context,
            }
    raise CheckpointError(
        f"{container.path} scales its rotary embedding in a way that is not Llama 3's ('rope_freqs.weight')"
    )


def _add_gemma_scale(container: Container, config: dict[str, Any]) -> None:
    is_27b = config["num_hidden_layers"] == GEMMA_27B_LAYERS[config["model_type"]]
    config["query_pre_attn_scalar"] = (
        config["hidden_size"] // config["num_attention_heads"] if is_27b else head_dim(container)
    )


def _add_mpt_attention(container: Container, config: dict[str, Any]) -> None:
    bias = _get(container, "attention.max_alibi_bias", 0.0)
    config["attn_config"] = {
        "alibi": bias > 0,
        "alibi_bias_max": int(bias) or 8,
        "clip_qkv": _get(container, "attention.clamp_kqv"),
    }
    config["expansion_ratio"] = container.require(_full_key(container, "feed_forward_length")) // config["d_model"]


def _add_phi3_scaling(container: Container, config: dict[str, Any]) -> None:
    # Phi-4 says "no sliding window" with a zero.
    config["sliding_window"] = config["sliding_window"] or None


_ADDITIONS: dict[str, Callable[[Container, dict[str, Any]], None]] = {
    "gemma2": _add_gemma_scale,
    "gemma3_text": _add_gemma_scale,
    "mpt": _add_mpt_attention,
    "phi3": _add_phi3_scaling,
}
