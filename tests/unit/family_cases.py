"""Tiny random models of every family, in the variants that configs allow, and what transformers makes of them."""

import json
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

TOLERANCE = 1e-4
PROMPT = 23  # longer than the windows below, so that they hide something
SEEDS = (7, 8)

SIZES: dict[str, Any] = {
    "hidden_size": 60,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "vocab_size": 131,
    "max_position_embeddings": 96,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GATED = SIZES | {"num_key_value_heads": 2, "intermediate_size": 88}
MANY = GATED | {"moe_intermediate_size": 44, "num_experts": 5, "num_experts_per_tok": 2}
GEMMA = GATED | {"head_dim": 14, "query_pre_attn_scalar": 20, "sliding_window": 7, "num_hidden_layers": 4}
FALCON = SIZES | {"bias": True}
OPT = SIZES | {"ffn_dim": 88, "word_embed_proj_dim": 60}
TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
ROPE = {"rope_theta": 500.0}
LLAMA3 = ROPE | {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.3, 1.5, 2.0, 2.5],
    "long_factor": [1.0, 2.0, 5.0, 9.0, 20.0],
}
YARN = ROPE | {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 24}


def rope(**fields: Any) -> dict[str, Any]:
    return {"rope_parameters": fields}


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", GATED | TIED),
    "llama, biases, wide heads": ("llama", GATED | UNTIED | {"attention_bias": True, "mlp_bias": True, "head_dim": 18}),
    "llama, rope linear": ("llama", GATED | rope(rope_type="linear", factor=3.0, **ROPE)),
    "llama, rope dynamic": ("llama", GATED | rope(rope_type="dynamic", factor=3.0, **ROPE)),
    "llama, rope dynamic, past": (
        "llama",
        GATED | {"max_position_embeddings": 16} | rope(rope_type="dynamic", factor=3.0, **ROPE),
    ),
    "llama, rope llama3": ("llama", GATED | rope(original_max_position_embeddings=48, **LLAMA3)),
    "llama, rope yarn": ("llama", GATED | rope(**YARN)),
    "llama, rope yarn, plain edges": ("llama", GATED | rope(truncate=False, beta_fast=16.0, beta_slow=2.0, **YARN)),
    "llama, rope yarn, scaled": ("llama", GATED | rope(mscale=0.8, mscale_all_dim=0.4, **YARN)),
    "llama, rope proportional": ("llama", GATED | rope(rope_type="proportional", partial_rotary_factor=0.5, **ROPE)),
    "mistral": ("mistral", GATED | {"sliding_window": 7, "head_dim": 12}),
    "mistral, no window": ("mistral", GATED | {"sliding_window": None}),
    "mixtral": ("mixtral", GATED | {"num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": 9}),
    "qwen2": ("qwen2", GATED | TIED),
    "qwen2, windows": (
        "qwen2",
        GATED | {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    ),
    "qwen2_moe": ("qwen2_moe", MANY | {"shared_expert_intermediate_size": 52}),
    "qwen2_moe, some dense, windows": (
        "qwen2_moe",
        MANY
        | {"shared_expert_intermediate_size": 52, "norm_topk_prob": True, "mlp_only_layers": [1], "qkv_bias": False}
        | {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2},
    ),
    "qwen3": ("qwen3", GATED | {"head_dim": 14, "attention_bias": True}),
    "qwen3_moe": ("qwen3_moe", MANY | {"head_dim": 14, "norm_topk_prob": True}),
    "qwen3_moe, every second, windows": (
        "qwen3_moe",
        MANY | {"head_dim": 14, "decoder_sparse_step": 2, "use_sliding_window": True, "sliding_window": 7},
    ),
    "smollm3": ("smollm3", GATED | {"num_hidden_layers": 5}),
    "smollm3, windows": (
        "smollm3",
        GATED | {"no_rope_layers": [1, 0, 1], "use_sliding_window": True, "sliding_window": 7} | UNTIED,
    ),
    "olmo": ("olmo", GATED | {"clip_qkv": 0.7}),
    "olmo2": ("olmo2", GATED | {"attention_bias": True}),
    "granite": (
        "granite",
        GATED
        | {"embedding_multiplier": 6.0, "logits_scaling": 4.0, "residual_multiplier": 0.22}
        | {"attention_multiplier": 0.15, "attention_bias": True, "mlp_bias": True},
    ),
    "gemma": ("gemma", GATED | {"head_dim": 14, "hidden_act": "gelu"}),
    "gemma2": ("gemma2", GEMMA | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    "gemma2, no caps": ("gemma2", GEMMA | {"attn_logit_softcapping": None, "final_logit_softcapping": None} | UNTIED),
    "gemma3": ("gemma3_text", GEMMA | {"sliding_window_pattern": 3, "final_logit_softcapping": 3.0}),
    "gemma3, stretched": (
        "gemma3_text",
        GEMMA
        | {"layer_types": ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]}
        | {"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "rope_local_base_freq": 300.0, "rope_theta": 900.0},
    ),
    "phi3": ("phi3", GATED | {"sliding_window": 7}),
    "phi3, longrope short": (
        "phi3",
        GATED | {"original_max_position_embeddings": 48} | rope(**LONGROPE),
    ),
    "phi3, longrope long": ("phi3", GATED | {"original_max_position_embeddings": 12} | rope(**LONGROPE)),
    "phi3, partial": ("phi3", GATED | {"partial_rotary_factor": 0.6}),
    "phi": ("phi", GATED | {"partial_rotary_factor": 0.6}),
    "phi, norms of q and k": ("phi", GATED | {"qk_layernorm": True, "partial_rotary_factor": 0.4}),
    "starcoder2": ("starcoder2", GATED | {"sliding_window": 7}),
    "starcoder2, no bias": ("starcoder2", GATED | {"use_bias": False} | UNTIED),
    "stablelm": ("stablelm", GATED | {"partial_rotary_factor": 0.4}),
    "stablelm, parallel": (
        "stablelm",
        GATED
        | {"use_qkv_bias": True, "qk_layernorm": True, "use_parallel_residual": True, "partial_rotary_factor": 0.4},
    ),
    "cohere": ("cohere", GATED | {"logit_scale": 0.3}),
    "cohere, norms of q and k": ("cohere", GATED | {"use_qk_norm": True, "attention_bias": True}),
    "gpt2": ("gpt2", SIZES),
    "gpt2, narrow": ("gpt2", SIZES | {"n_inner": 88, "activation_function": "relu"} | UNTIED),
    "gptj": ("gptj", SIZES | {"rotary_dim": 4}),
    "gpt_neox": ("gpt_neox", SIZES | {"intermediate_size": 88, "rotary_pct": 0.4}),
    "gpt_neox, sequential": (
        "gpt_neox",
        SIZES
        | {"intermediate_size": 88, "rotary_pct": 0.8, "use_parallel_residual": False, "attention_bias": False}
        | TIED,
    ),
    "opt": ("opt", OPT),
    "opt, norms after": ("opt", OPT | {"do_layer_norm_before": False, "word_embed_proj_dim": 36}),
    "opt, bare": ("opt", OPT | {"enable_bias": False, "layer_norm_elementwise_affine": False} | UNTIED),
    "bloom": ("bloom", SIZES),
    "mpt": ("mpt", SIZES | {"max_seq_len": 96}),
    "mpt, clipped": ("mpt", SIZES | {"max_seq_len": 96, "attn_config": {"clip_qkv": 0.5, "softmax_scale": 0.2}}),
    "falcon, one key head": ("falcon", FALCON | {"ffn_hidden_size": 88}),
    "falcon, two norms": ("falcon", FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon, one norm": (
        "falcon",
        SIZES | {"new_decoder_architecture": True, "num_kv_heads": 3, "num_ln_in_parallel_attn": 1},
    ),
    "falcon, alibi": ("falcon", FALCON | {"alibi": True, "parallel_attn": False, "multi_query": False}),
    "gpt_oss": (
        "gpt_oss",
        GATED | {"num_local_experts": 5, "num_experts_per_tok": 2, "head_dim": 14, "sliding_window": 7}
        # its own yarn is for heads of 64 channels
        | rope(**YARN),
    ),
}  # fmt: skip


def tiny_model(model_type: str, fields: dict[str, Any], attention: str = "eager") -> PreTrainedModel:
    """A random model in which every weight, bias and norm matters."""
    config = AutoConfig.for_model(model_type, **json.loads(json.dumps(fields)))
    torch.manual_seed(SEEDS[0])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape)
            if parameter.ndim > 1:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(noise * 0.2)
    return model


def prompt() -> list[int]:
    return np.random.default_rng(SEEDS[1]).integers(0, SIZES["vocab_size"], PROMPT).tolist()


def reference_logits(model: PreTrainedModel) -> np.ndarray:
    with torch.inference_mode():
        return model(torch.tensor([prompt()]), use_cache=False).logits[0].double().numpy()


def arrays(model: PreTrainedModel) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}
