"""One block of a tiny random model of several families, and a call of it, as the scalers see them."""

import functools
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from lowbit.models.capture import Call, find_blocks, record_calls
from lowbit_assets import tiny_model_in_memory

_SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 97,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GATED = _SIZES | {"num_key_value_heads": 2, "intermediate_size": 96}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _GATED,
    "qwen2": _GATED,
    "qwen3": _GATED | {"head_dim": 16},
    "gemma2": _GATED | {"head_dim": 16},
    "phi3": _GATED,
    "olmo2": _GATED,
    "cohere": _GATED,
    "opt": _SIZES | {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "gpt_neox": _SIZES | {"intermediate_size": 96},
    "gpt2": _SIZES,
    "gptj": _SIZES | {"rotary_dim": 8},
    "falcon": _SIZES | {"alibi": False, "multi_query": True},
    # Every expert gets every token, so that rounding cannot send one elsewhere.
    "mixtral": _GATED | {"num_local_experts": 4, "num_experts_per_tok": 4},
    "deepseek_v2": _GATED
    | {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
    | {"first_k_dense_replace": 2, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
}
TOKENS = 48


@functools.cache
def _made(family: str) -> tuple[nn.Module, Call]:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **CONFIGS[family])).eval().float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    ids = torch.randint(3, 97, (4, TOKENS))
    name = find_blocks(model, ids)[-1]
    return model.get_submodule(name), record_calls(model, [name], ids)[0]


def block_of(family: str, outliers: bool = False) -> tuple[nn.Module, Call]:
    """The last block, fresh, and its call; with outliers, a few channels of every norm are far larger than the others."""
    from copy import deepcopy

    made, call = _made(family)
    block = deepcopy(made)
    if outliers:
        with torch.no_grad():
            for name, parameter in block.named_parameters():
                if parameter.dim() == 1 and "norm" in name and name.endswith("weight"):
                    parameter[::13] *= 15
    return block, call


def with_an_idle_expert() -> Any:
    """A mixture that never sends a token to its last expert."""
    model = tiny_model_in_memory("qwen3_moe")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight[-1] = 0
            layer.mlp.gate.weight[:-1].abs_()
            layer.post_attention_layernorm.weight.abs_()
    return model
