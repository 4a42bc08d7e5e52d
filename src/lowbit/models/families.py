"""The families: one row each, saying where a `model_type` of Hugging Face differs from Llama.

    spec = spec_from_config(json.loads((folder / "config.json").read_text()))

A place in a row holds a plain value, or `field("name", default=...)` where the config decides. `family.Family` lists
the places, `names` has the dialects of weight names, `variations` what takes more than a field: patterns of layers,
experts, and families whose config moves several places at once. A new family is one row here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lowbit.errors import RecipeError, nearest
from lowbit.models import names
from lowbit.models import variations as vary
from lowbit.models.config import field
from lowbit.models.family import Family, build
from lowbit.models.spec import DecoderSpec
from lowbit.models.variations import BARE_LAYER_NORM, GEMMA_NORM, LAYER_NORM

TIED = field("tie_word_embeddings", default=True)
LAYER_NORM_EPS = field("layer_norm_epsilon", "layer_norm_eps", default=1e-5)
ALL_BIASED = {"attention": True, "output": True, "mlp": True, "norm": True}
ATTENTION_BIAS = field("attention_bias", default=False)
ATTENTION_BIASES = {"attention": ATTENTION_BIAS, "output": ATTENTION_BIAS}
WINDOW = field("sliding_window")

FAMILIES: dict[str, Family] = {
    "llama": Family(biases={**ATTENTION_BIASES, "mlp": field("mlp_bias", default=False)}),
    "mistral": Family(kinds=vary.all_sliding, window=WINDOW, defaults={"sliding_window": 4096}),
    "mixtral": Family(
        names=names.MIXTRAL,
        kinds=vary.all_sliding,
        window=WINDOW,
        eps=field("rms_norm_eps", default=1e-5),
        experts=vary.mixtral_experts,
        defaults={"rope_theta": 1e6},
    ),
    "qwen2": Family(
        kinds=vary.listed(vary.after_max_window_layers),
        biases={"attention": True},
        vary=vary.without_window_unless_asked,
    ),
    "qwen2_moe": Family(
        names=names.QWEN_MOE,
        kinds=vary.listed(vary.even_before_max_window_layers),
        biases={"attention": field("qkv_bias", default=True)},
        experts=vary.qwen_experts,
        sparse=vary.sparse_steps,
        vary=vary.without_window_unless_asked,
    ),
    "qwen3": Family(
        kinds=vary.listed(vary.after_max_window_layers),
        qk_norm="head",
        biases=ATTENTION_BIASES,
        vary=vary.without_window_unless_asked,
        defaults={"head_dim": 128},
    ),
    "qwen3_moe": Family(
        names=names.QWEN_MOE,
        kinds=vary.all_sliding,
        qk_norm="head",
        biases=ATTENTION_BIASES,
        experts=vary.qwen_experts,
        sparse=vary.sparse_steps,
        vary=vary.without_window_unless_asked,
        unused=frozenset({"max_window_layers"}),
    ),
    "smollm3": Family(
        kinds=vary.listed(vary.layers_without_positions),
        turned=vary.turned_layers,
        biases={**ATTENTION_BIASES, "mlp": field("mlp_bias", default=False)},
        tied=TIED,
        vary=vary.without_window_unless_asked,
        unused=frozenset({"max_window_layers"}),
        defaults={"rope_theta": 2e6},
    ),
    "olmo": Family(
        norm=BARE_LAYER_NORM,
        eps=1e-5,
        biases=ATTENTION_BIASES,
        clip=field("clip_qkv"),
    ),
    "olmo2": Family(
        names=names.OLMO2,
        eps=field("rms_norm_eps", default=1e-5),
        placement="post",
        qk_norm="width",
        biases=ATTENTION_BIASES,
    ),
    "granite": Family(
        scale=field("attention_multiplier", default=1.0),
        biases={**ATTENTION_BIASES, "mlp": field("mlp_bias", default=False)},
        embedding_multiplier=field("embedding_multiplier", default=1.0),
        residual_multiplier=field("residual_multiplier", default=1.0),
        logits_divisor=field("logits_scaling", default=1.0),
    ),
    "gemma": Family(
        norm=GEMMA_NORM, biases=ATTENTION_BIASES, tied=TIED, vary=vary.vary_gemma, defaults={"head_dim": 256}
    ),
    "gemma2": Family(
        names=names.GEMMA2,
        norm=GEMMA_NORM,
        placement="sandwich",
        kinds=vary.listed(vary.even_layers),
        window=WINDOW,
        scale_of=field("query_pre_attn_scalar", default=256),
        soft_cap=field("attn_logit_softcapping"),
        logits_cap=field("final_logit_softcapping"),
        biases=ATTENTION_BIASES,
        tied=TIED,
        vary=vary.vary_gemma,
        defaults={
            "head_dim": 256,
            "sliding_window": 4096,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
    ),
    "gemma3_text": Family(
        names=names.GEMMA3,
        norm=GEMMA_NORM,
        placement="sandwich",
        qk_norm="head",
        kinds=vary.listed(vary.all_but_every_sixth),
        window=WINDOW,
        scale_of=field("query_pre_attn_scalar", default=256),
        logits_cap=field("final_logit_softcapping"),
        biases=ATTENTION_BIASES,
        tied=TIED,
        vary=vary.vary_gemma,
        # Configs of the models with eyes leave out what equals the class's own default.
        defaults={
            "vocab_size": 262208,
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "num_hidden_layers": 26,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "max_position_embeddings": 131072,
            "sliding_window": 4096,
            "rope_theta": 1e6,
            "rope_local_base_freq": 1e4,
        },
    ),
    "phi3": Family(
        names=names.PHI3,
        eps=field("rms_norm_eps", default=1e-5),
        qkv="concatenated",
        gate="concatenated",
        partial_rotary=True,
        kinds=vary.all_sliding,
        window=WINDOW,
        requires={"full_attn_mod": 1, "interpolate_factor": 1, "attention_bias": False, "lm_head_bias": False},
        defaults={"original_max_position_embeddings": 4096},
    ),
    "phi": Family(
        names=names.PHI,
        norm=LAYER_NORM,
        eps=LAYER_NORM_EPS,
        residual="parallel_shared",
        partial_rotary=True,
        activation=field("hidden_act", default="gelu_new"),
        gate="none",
        biases={**ALL_BIASED, "qk_norm": True, "head": True},
        vary=vary.vary_phi,
        defaults={"partial_rotary_factor": 0.5},
    ),
    "starcoder2": Family(
        names=names.STARCODER2,
        norm=LAYER_NORM,
        eps=field("norm_epsilon", default=1e-5),
        kinds=vary.all_sliding,
        window=WINDOW,
        activation=field("hidden_act", default="gelu_pytorch_tanh"),
        gate="none",
        biases={**dict.fromkeys(("attention", "output", "mlp"), field("use_bias", default=True)), "norm": True},
        tied=TIED,
        requires={"mlp_type": "default", "norm_type": "layer_norm", "scale_attn_weights": True},
        unused=frozenset({"scale_attention_softmax_in_fp32"}),
    ),
    "stablelm": Family(
        names=names.STABLELM,
        norm=LAYER_NORM,
        eps=LAYER_NORM_EPS,
        partial_rotary=True,
        biases={"attention": field("use_qkv_bias", default=False), "norm": True},
        vary=vary.vary_stablelm,
        defaults={"partial_rotary_factor": 0.25},
    ),
    "cohere": Family(
        norm=LAYER_NORM,
        eps=LAYER_NORM_EPS,
        residual="parallel_shared",
        pairing="neighbours",
        biases=ATTENTION_BIASES,
        logits_multiplier=field("logit_scale", default=0.0625),
        tied=TIED,
        vary=vary.vary_cohere,
        defaults={"rope_theta": 5e5},
    ),
    "gpt2": Family(
        names=names.GPT2,
        norm=LAYER_NORM,
        eps=LAYER_NORM_EPS,
        positions="learned",
        qkv="concatenated",
        activation=field("activation_function", default="gelu_new"),
        intermediate_size=field("n_inner"),
        gate="none",
        biases=ALL_BIASED,
        tied=TIED,
        requires={
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "add_cross_attention": False,
        },
    ),
    "gptj": Family(
        names=names.GPTJ,
        norm=LAYER_NORM,
        eps=LAYER_NORM_EPS,
        residual="parallel_shared",
        pairing="neighbours",
        partial_rotary=True,
        rotary_dim=field("rotary_dim"),
        activation=field("activation_function", default="gelu_new"),
        intermediate_size=field("n_inner"),
        gate="none",
        biases={"mlp": True, "norm": True, "head": True},
        requires={"rotary": True, "scale_attn_weights": True},
        defaults={"rotary_dim": 64},
    ),
    "gpt_neox": Family(
        names=names.GPT_NEOX,
        norm=LAYER_NORM,
        eps=LAYER_NORM_EPS,
        partial_rotary=True,
        qkv="grouped",
        activation=field("hidden_act", default="gelu"),
        gate="none",
        biases={**ALL_BIASED, **dict.fromkeys(("attention", "output"), field("attention_bias", default=True))},
        vary=vary.vary_gpt_neox,
        defaults={"rotary_pct": 0.25},
    ),
    "opt": Family(
        names=names.OPT,
        norm=LAYER_NORM,
        eps=1e-5,
        positions="learned",
        position_offset=2,
        activation=field("activation_function", default="relu"),
        intermediate_size=field("ffn_dim"),
        gate="none",
        embedding_width=field("word_embed_proj_dim"),
        biases=dict.fromkeys(("attention", "output", "mlp"), field("enable_bias", default=True)),
        tied=TIED,
        vary=vary.vary_opt,
    ),
    "bloom": Family(
        names=names.BLOOM,
        norm=LAYER_NORM,
        eps=LAYER_NORM_EPS,
        positions="alibi",
        qkv="grouped",
        activation="gelu_tanh",
        intermediate_size=field("n_inner"),
        gate="none",
        embedding_norm=True,
        biases=ALL_BIASED,
        tied=TIED,
        requires={"apply_residual_connection_post_layernorm": False},
        unused=frozenset({"offset_alibi", "attention_softmax_in_fp32"}),
    ),
    "mpt": Family(
        names=names.MPT,
        norm=LAYER_NORM,
        eps=LAYER_NORM_EPS,
        positions="alibi",
        qkv="concatenated",
        activation="gelu",
        intermediate_size=None,
        gate="none",
        tied=TIED,
        requires={"no_bias": True, "expansion_ratio": 4, "logit_scale": None},
        unused=frozenset({"learned_pos_emb", "norm_type"}),
        vary=vary.vary_mpt,
    ),
    "falcon": Family(
        norm=LAYER_NORM,
        eps=LAYER_NORM_EPS,
        qkv="grouped",
        activation=field("activation", default="gelu"),
        intermediate_size=field("ffn_hidden_size"),
        gate="none",
        tied=TIED,
        vary=vary.vary_falcon,
        requires={"apply_residual_connection_post_layernorm": False},
        unused=frozenset({"rope_parameters", "rope_scaling", "rope_theta"}),  # of those with ALiBi
    ),
    "gpt_oss": Family(
        names=names.GPT_OSS,
        eps=field("rms_norm_eps", default=1e-5),
        sinks=True,
        kinds=vary.listed(vary.even_layers),
        window=WINDOW,
        biases={**dict.fromkeys(("attention", "output"), field("attention_bias", default=True)), "experts": True},
        experts=vary.gpt_oss_experts,
        unused=frozenset({"experts_per_token"}),
        defaults={"rope_theta": 150000.0, "head_dim": 64, "sliding_window": 128},
    ),
}
# Models that see or hear, and the type of the text model inside them.
TEXT_PARTS = {"gemma3": "gemma3_text"}


def spec_from_config(config: Mapping[str, Any]) -> DecoderSpec:
    """What a model is, from its config.json (as a dict, of any version of transformers)."""
    model_type = str(config.get("model_type", ""))
    if model_type in TEXT_PARTS:
        text = {"model_type": TEXT_PARTS[model_type], **config.get("text_config", {})}
        return spec_from_config({**_outer_tokens(config), **text})
    family = FAMILIES.get(model_type)
    if family is None:
        raise RecipeError(
            f"lowbit has no engine for models of type {model_type!r}: {nearest(model_type, FAMILIES)}; "
            "it can still be quantised and run through transformers"
        )
    return build(model_type, family, config)


def _outer_tokens(config: Mapping[str, Any]) -> dict[str, Any]:
    """A model with eyes or ears keeps its special tokens beside the text part."""
    return {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id") if name in config}
