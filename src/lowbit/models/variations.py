"""What a row of the families says with a function: patterns of layers, experts, and configs that move several places.

Each reads the fields it needs through `Config`, which also marks them as understood.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from lowbit.models import names
from lowbit.models.config import Config
from lowbit.models.family import FULL, SLIDING, Family, LayerKinds
from lowbit.models.spec import Activation, ExpertsSpec, MlpSpec, NormSpec

LAYER_NORM = NormSpec("layer", eps=0.0)
BARE_LAYER_NORM = NormSpec("layer", eps=0.0, weight=False)
GEMMA_NORM = NormSpec("rms", eps=0.0, offset=1.0)


# --- which layers have windows, positions, experts ---


def all_sliding(config: Config, count: int) -> list[str]:
    """Every layer has the config's window, if it has one."""
    return [SLIDING] * count


def listed(otherwise: LayerKinds) -> LayerKinds:
    """What `layer_types` says, layer by layer; configs older than that field mean the pattern `otherwise`."""

    def kinds(config: Config, count: int) -> list[str]:
        pattern = otherwise(config, count)  # read in any case: it marks its fields as understood
        return list(config.get("layer_types", default=pattern))

    return kinds


def after_max_window_layers(config: Config, count: int) -> list[str]:
    first = int(config.get("max_window_layers", default=28))
    return [SLIDING if i >= first else FULL for i in range(count)]


def even_before_max_window_layers(config: Config, count: int) -> list[str]:
    last = int(config.get("max_window_layers", default=28))
    return [SLIDING if i % 2 == 0 and i < last else FULL for i in range(count)]


def even_layers(config: Config, count: int) -> list[str]:
    return [SLIDING if i % 2 == 0 else FULL for i in range(count)]


def all_but_every_sixth(config: Config, count: int) -> list[str]:
    period = int(config.get("sliding_window_pattern", "_sliding_window_pattern", default=6))
    return [SLIDING if (i + 1) % period else FULL for i in range(count)]


def layers_without_positions(config: Config, count: int) -> list[str]:
    return [FULL if turned else SLIDING for turned in turned_layers(config, count)]


def turned_layers(config: Config, count: int) -> list[bool]:
    """SmolLM 3 turns the layers that `no_rope_layers` marks with a 1, whatever that name suggests."""
    period = int(config.get("no_rope_layer_interval", default=4))
    return [bool(flag) for flag in config.get("no_rope_layers", default=[(i + 1) % period for i in range(count)])]


def without_window_unless_asked(config: Config, family: Family) -> Family:
    """Qwen names a window in every config and means it only where `use_sliding_window` is set."""
    window = config.get("sliding_window", default=None)
    return dataclasses.replace(family, window=window if config.get("use_sliding_window", default=False) else None)


def sparse_steps(config: Config, count: int) -> list[bool]:
    step, dense = int(config.get("decoder_sparse_step", default=1)), config.get("mlp_only_layers", default=[])
    some = int(config.get("num_experts", "num_local_experts")) > 0
    return [some and i not in dense and (i + 1) % step == 0 for i in range(count)]


# --- the experts ---


def qwen_experts(config: Config, activation: Activation) -> ExpertsSpec:
    size, shared = config.get("moe_intermediate_size"), config.get("shared_expert_intermediate_size", default=0)
    return ExpertsSpec(
        count=int(config.get("num_experts", "num_local_experts")),
        top_k=int(config.get("num_experts_per_tok")),
        normalize=bool(config.get("norm_topk_prob", default=False)),
        expert=MlpSpec(int(size), activation, "concatenated"),
        shared=MlpSpec(int(shared), activation) if shared else None,
    )


def mixtral_experts(config: Config, activation: Activation) -> ExpertsSpec:
    return ExpertsSpec(
        count=int(config.get("num_local_experts", "num_experts", default=8)),
        top_k=int(config.get("num_experts_per_tok", default=2)),
        normalize=True,
        expert=MlpSpec(int(config.get("intermediate_size")), activation, "concatenated"),
    )


def gpt_oss_experts(config: Config, activation: Activation) -> ExpertsSpec:
    limit, scale = float(config.get("swiglu_limit", default=7.0)), float(config.get("swiglu_alpha", default=1.702))
    size = int(config.get("intermediate_size"))
    return ExpertsSpec(
        count=int(config.get("num_local_experts", "num_experts")),
        top_k=int(config.get("num_experts_per_tok", "experts_per_token")),
        normalize=True,
        expert=MlpSpec(size, activation, "interleaved", limit=limit, sigmoid_scale=scale),
    )


# --- families whose config moves several places at once ---


def vary_gemma(config: Config, family: Family) -> Family:
    """Embeddings grow by sqrt(hidden_size). The first Gemma configs say gelu and mean its tanh approximation."""
    activation = config.get("hidden_activation", "hidden_act", default="gelu_pytorch_tanh")
    activation = "gelu_tanh" if activation == "gelu" else activation
    return dataclasses.replace(
        family, embedding_multiplier=math.sqrt(config.get("hidden_size", default=2304)), activation=activation
    )


def vary_opt(config: Config, family: Family) -> Family:
    before = bool(config.get("do_layer_norm_before", default=True))
    affine = bool(config.get("layer_norm_elementwise_affine", default=True))
    return dataclasses.replace(
        family,
        norm=LAYER_NORM if affine else BARE_LAYER_NORM,
        placement="pre" if before else "after_sum",
        final_norm=before and not config.get("_remove_final_layer_norm", default=False),
        biases={**family.biases, "norm": affine},
    )


def vary_mpt(config: Config, family: Family) -> Family:
    attention = config.group("attn_config")
    for name, only in {"alibi": True, "alibi_bias_max": 8, "qk_ln": False, "prefix_lm": False}.items():
        attention.require(name, only)
    attention.require("attn_type", "multihead_attention")
    varied = dataclasses.replace(
        family, clip=attention.get("clip_qkv", default=None), scale=attention.get("softmax_scale", default=None)
    )
    attention.refuse_unread()
    return varied


def vary_gpt_neox(config: Config, family: Family) -> Family:
    """GPT-NeoX adds both branches to the same input, unless told not to."""
    parallel = config.get("use_parallel_residual", default=True)
    return dataclasses.replace(family, residual="parallel" if parallel else "sequential")


def vary_stablelm(config: Config, family: Family) -> Family:
    return dataclasses.replace(
        family,
        qk_norm="heads" if config.get("qk_layernorm", default=False) else "none",
        residual="parallel_shared" if config.get("use_parallel_residual", default=False) else "sequential",
    )


def vary_phi(config: Config, family: Family) -> Family:
    return dataclasses.replace(family, qk_norm="head" if config.get("qk_layernorm", default=False) else "none")


def vary_cohere(config: Config, family: Family) -> Family:
    return dataclasses.replace(family, qk_norm="heads" if config.get("use_qk_norm", default=False) else "none")


def vary_falcon(config: Config, family: Family) -> Family:
    """Three generations: one key head for all (7B), ALiBi and a head each (RW), groups and two norms (40B, 180B)."""
    new = bool(config.get("new_decoder_architecture", default=False))
    parallel = bool(config.get("parallel_attn", default=True)) or new
    single = bool(config.get("multi_query", default=True)) and not new
    norms = config.get("num_ln_in_parallel_attn", default=2 if new else 1)
    kv_heads = config.get("num_kv_heads", default=None)
    two_norms = new and norms == 2
    biased = bool(config.get("bias", default=False))
    shared: Any = "parallel" if two_norms else "parallel_shared"
    return dataclasses.replace(
        family,
        names=names.FALCON_TWO_NORMS if two_norms else names.BLOOM,
        kv_heads=1 if single else kv_heads if new else None,
        residual=shared if parallel else "sequential",
        positions="alibi" if config.get("alibi", default=False) else "rope",
        alibi_scaled=True,
        biases={"attention": biased, "output": biased, "mlp": biased, "norm": True},
    )
