"""What GGUF calls the tensors of each family, and what Hugging Face calls them: one row per family.

GGUF names a tensor `blk.<layer>.<stem>.<weight|bias>`, or `<stem>.<weight|bias>` outside the layers; a `TensorRow`
pairs a stem with its Hugging Face stem. `{i}` is the layer, `{e}` an expert (or, for StableLM's norms, a head). The
converters of llama.cpp also change some numbers on the way; `change` names what has to be undone:

    rotary_q, rotary_k   rows of a head lie in rotary pairs (0, d/2, 1, d/2+1, ...) instead of two halves
    qkv_heads            all queries, all keys, all values, instead of q, k, v head by head (BLOOM, GPT-NeoX)
    qkv_groups           the same for groups of queries that share one key and value (Falcon)
    minus_one            norm weights have 1 added (Gemma)
    transpose            [out, in] instead of the [in, out] of GPT-2's Conv1D
    split                one stacked tensor instead of one per expert
    as_row               a vector [in] instead of a matrix [1, in]

Source: the `conversion` folder and `gguf-py/gguf/tensor_mapping.py` of llama.cpp (as in llama-cpp-python 0.3.36),
checked by round trips in the tests. The names are those of checkpoint files (one matrix per expert), which every
version of transformers and vLLM reads.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class TensorRow:
    """One tensor of a layer or of the frame around the layers."""

    gguf: str
    hf: str
    change: str = ""


@dataclass(frozen=True, slots=True)
class ConfigRow:
    """One key of config.json and where it comes from.

    `source` is a metadata key without its architecture prefix, or `has:` a tensor (a boolean), or `rows:` a tensor
    (its number of rows). Several sources, separated by spaces, are tried in turn; if none is there and no `default`
    is given, that is an error.
    """

    key: str
    source: str
    default: Any = "required"


@dataclass(frozen=True, slots=True)
class GgufFamily:
    """One decoder family. `when` tells rows of one architecture apart: a metadata key or `has:` a tensor."""

    architecture: str
    model_type: str
    model_class: str
    layer: str
    tensors: tuple[TensorRow, ...]
    config: tuple[ConfigRow, ...]
    constants: dict[str, Any] = field(default_factory=dict)
    when: str = ""


def _rows(*pairs: str) -> tuple[TensorRow, ...]:
    """`"gguf_stem hf_stem [change]"` as rows."""
    return tuple(TensorRow(*pair.split()) for pair in pairs)


# Tensors that are no weights: rotary tables, which go into the config (gguf_config), and left-overs of old files.
NOT_WEIGHTS = {"rope_freqs", "rope_factors_long", "rope_factors_short", "attn_rot_embd"}

_FRAME = _rows("token_embd model.embed_tokens", "output_norm model.norm", "output lm_head")
_NORMS = _rows("attn_norm input_layernorm", "ffn_norm post_attention_layernorm")
_ROTARY = _rows("attn_q self_attn.q_proj rotary_q", "attn_k self_attn.k_proj rotary_k")
_PLAIN = _rows("attn_q self_attn.q_proj", "attn_k self_attn.k_proj")
_VALUE = _rows("attn_v self_attn.v_proj", "attn_output self_attn.o_proj")
_GATED = _rows("ffn_gate mlp.gate_proj", "ffn_up mlp.up_proj", "ffn_down mlp.down_proj")
_QK_NORMS = _rows("attn_q_norm self_attn.q_norm", "attn_k_norm self_attn.k_norm")
_AROUND = _rows("post_attention_norm post_attention_layernorm", "post_ffw_norm post_feedforward_layernorm")
_EXPERTS = _rows(
    "ffn_gate_inp mlp.gate",
    "ffn_gate_exps mlp.experts.{e}.gate_proj split",
    "ffn_up_exps mlp.experts.{e}.up_proj split",
    "ffn_down_exps mlp.experts.{e}.down_proj split",
)
_MIXTRAL_EXPERTS = _rows(
    "ffn_gate_inp block_sparse_moe.gate",
    "ffn_gate_exps block_sparse_moe.experts.{e}.w1 split",
    "ffn_down_exps block_sparse_moe.experts.{e}.w2 split",
    "ffn_up_exps block_sparse_moe.experts.{e}.w3 split",
    # files from before April 2024 hold one tensor per expert
    "ffn_gate.{e} block_sparse_moe.experts.{e}.w1",
    "ffn_down.{e} block_sparse_moe.experts.{e}.w2",
    "ffn_up.{e} block_sparse_moe.experts.{e}.w3",
)
_SHARED_EXPERT = _rows(
    "ffn_gate_inp_shexp mlp.shared_expert_gate as_row",
    "ffn_gate_shexp mlp.shared_expert.gate_proj",
    "ffn_up_shexp mlp.shared_expert.up_proj",
    "ffn_down_shexp mlp.shared_expert.down_proj",
)
_TWO_LAYER = _rows("ffn_up mlp.dense_h_to_4h", "ffn_down mlp.dense_4h_to_h")
_LLAMA = _FRAME + _NORMS + _ROTARY + _VALUE + _GATED
_QWEN = _FRAME + _NORMS + _PLAIN + _VALUE
_GEMMA = _rows(
    "token_embd model.embed_tokens", "output_norm model.norm minus_one", "attn_norm input_layernorm minus_one"
)
_GEMMA_AROUND = _rows(
    "post_attention_norm post_attention_layernorm minus_one",
    "ffn_norm pre_feedforward_layernorm minus_one",
    "post_ffw_norm post_feedforward_layernorm minus_one",
)
_GEMMA_QK_NORMS = _rows("attn_q_norm self_attn.q_norm minus_one", "attn_k_norm self_attn.k_norm minus_one")
_FALCON = _rows(
    "token_embd transformer.word_embeddings",
    "output_norm transformer.ln_f",
    "output lm_head",
    "attn_qkv self_attention.query_key_value qkv_groups",
    "attn_output self_attention.dense",
)


def _sizes(*keys: str, norm: str) -> tuple[ConfigRow, ...]:
    """The sizes that every file states, under the family's own keys: layers, width, inner width, heads, context."""
    sources = ("block_count", "embedding_length", "feed_forward_length", "attention.head_count", "context_length")
    epsilon = "attention.layer_norm_rms_epsilon" if norm.startswith("rms") else "attention.layer_norm_epsilon"
    return (
        *(ConfigRow(key, source) for key, source in zip(keys, sources, strict=True) if key),
        ConfigRow(norm, epsilon),
    )


_WIDTHS = ("num_hidden_layers", "hidden_size", "intermediate_size")
_STANDARD_KEYS = (*_WIDTHS, "num_attention_heads", "max_position_embeddings")
_KEY_VALUE_HEADS = (ConfigRow("num_key_value_heads", "attention.head_count_kv attention.head_count"),)
_RMS = _sizes(*_STANDARD_KEYS, norm="rms_norm_eps") + _KEY_VALUE_HEADS
_HEAD_DIM = (ConfigRow("head_dim", "attention.key_length", None),)
_LLAMA_BIASES = (ConfigRow("attention_bias", "has:blk.0.attn_q.bias"), ConfigRow("mlp_bias", "has:blk.0.ffn_up.bias"))
_ATTENTION_BIAS = (ConfigRow("attention_bias", "has:blk.0.attn_q.bias"),)
_WINDOW = (ConfigRow("sliding_window", "attention.sliding_window", None),)
_ACTIVE_EXPERTS = (ConfigRow("num_experts_per_tok", "expert_used_count"),)
_EXPERT_SIZES = (
    ConfigRow("num_experts", "expert_count"),
    *_ACTIVE_EXPERTS,
    ConfigRow("moe_intermediate_size", "expert_feed_forward_length rows:blk.0.ffn_gate_exps.weight"),
)
_PARALLEL = (ConfigRow("use_parallel_residual", "use_parallel_residual", True),)
_FALCON_CONFIG = (
    *(row for row in _sizes(*_STANDARD_KEYS, norm="layer_norm_epsilon") if row.key != "intermediate_size"),
    ConfigRow("num_kv_heads", "attention.head_count_kv", 1),
    ConfigRow("ffn_hidden_size", "rows:blk.0.ffn_up.weight"),
    ConfigRow("bias", "has:blk.0.attn_qkv.bias"),
)
_GRANITE_SCALES = (
    ConfigRow("attention_multiplier", "attention.scale"),
    ConfigRow("embedding_multiplier", "embedding_scale", 1.0),
    ConfigRow("residual_multiplier", "residual_scale", 1.0),
    ConfigRow("logits_scaling", "logit_scale", 1.0),
)
_SOFT_CAPS = (
    ConfigRow("attn_logit_softcapping", "attn_logit_softcapping", None),
    ConfigRow("final_logit_softcapping", "final_logit_softcapping", None),
)
_TANH_GELU = {"hidden_activation": "gelu_pytorch_tanh"}
_LAYERS = "model.layers.{i}"

FAMILIES: tuple[GgufFamily, ...] = (
    GgufFamily(
        "llama",
        "mixtral",
        "MixtralForCausalLM",
        _LAYERS,
        _FRAME + _NORMS + _ROTARY + _VALUE + _MIXTRAL_EXPERTS,
        (*_RMS, *_HEAD_DIM, *_WINDOW, ConfigRow("num_local_experts", "expert_count"), *_ACTIVE_EXPERTS),
        when="expert_count",
    ),
    # Llama 1 to 3, SmolLM 1 and 2, TinyLlama, Mistral: to llama.cpp, and to these weights, one architecture.
    GgufFamily("llama", "llama", "LlamaForCausalLM", _LAYERS, _LLAMA, _RMS + _HEAD_DIM + _LLAMA_BIASES),
    GgufFamily(
        "smollm3", "smollm3", "SmolLM3ForCausalLM", _LAYERS, _LLAMA, _RMS + _LLAMA_BIASES, {"no_rope_layer_interval": 4}
    ),
    GgufFamily("granite", "granite", "GraniteForCausalLM", _LAYERS, _LLAMA, _RMS + _LLAMA_BIASES + _GRANITE_SCALES),
    GgufFamily("qwen2", "qwen2", "Qwen2ForCausalLM", _LAYERS, _QWEN + _GATED, _RMS),
    GgufFamily(
        "qwen2moe",
        "qwen2_moe",
        "Qwen2MoeForCausalLM",
        _LAYERS,
        _QWEN + _EXPERTS + _SHARED_EXPERT,
        (
            *_RMS,
            *_EXPERT_SIZES,
            ConfigRow(
                "shared_expert_intermediate_size", "expert_shared_feed_forward_length rows:blk.0.ffn_gate_shexp.weight"
            ),
        ),
        {"norm_topk_prob": False, "decoder_sparse_step": 1, "mlp_only_layers": []},
    ),
    GgufFamily(
        "qwen3", "qwen3", "Qwen3ForCausalLM", _LAYERS, _QWEN + _QK_NORMS + _GATED, _RMS + _HEAD_DIM + _ATTENTION_BIAS
    ),
    GgufFamily(
        "qwen3moe",
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        _LAYERS,
        _QWEN + _QK_NORMS + _EXPERTS,
        _RMS + _HEAD_DIM + _EXPERT_SIZES + _ATTENTION_BIAS,
        {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []},
    ),
    GgufFamily(
        "phi3",
        "phi3",
        "Phi3ForCausalLM",
        _LAYERS,
        _FRAME
        + _NORMS
        + _rows(
            "attn_qkv self_attn.qkv_proj",
            "attn_output self_attn.o_proj",
            "ffn_up mlp.gate_up_proj",
            "ffn_down mlp.down_proj",
        ),
        (
            *_RMS,
            *_WINDOW,
            ConfigRow("original_max_position_embeddings", "rope.scaling.original_context_length context_length"),
        ),
    ),
    GgufFamily(
        "gemma",
        "gemma",
        "GemmaForCausalLM",
        _LAYERS,
        _GEMMA + _rows("ffn_norm post_attention_layernorm minus_one") + _PLAIN + _VALUE + _GATED,
        _RMS + _HEAD_DIM,
        {"hidden_act": "gelu_pytorch_tanh"} | _TANH_GELU,
    ),
    GgufFamily(
        "gemma2",
        "gemma2",
        "Gemma2ForCausalLM",
        _LAYERS,
        _GEMMA + _GEMMA_AROUND + _PLAIN + _VALUE + _GATED,
        _RMS + _HEAD_DIM + _WINDOW + _SOFT_CAPS,
        _TANH_GELU,
    ),
    GgufFamily(
        "gemma3",
        "gemma3_text",
        "Gemma3ForCausalLM",
        _LAYERS,
        _GEMMA + _GEMMA_AROUND + _GEMMA_QK_NORMS + _PLAIN + _VALUE + _GATED,
        (*_RMS, *_HEAD_DIM, *_WINDOW, *_SOFT_CAPS, ConfigRow("rope_local_base_freq", "rope.freq_base_swa", 10000.0)),
        {"sliding_window_pattern": 6} | _TANH_GELU,
    ),
    GgufFamily(
        "olmo2",
        "olmo2",
        "Olmo2ForCausalLM",
        _LAYERS,
        _FRAME + _PLAIN + _VALUE + _QK_NORMS + _AROUND + _GATED,
        _RMS + _ATTENTION_BIAS,
    ),
    GgufFamily(
        "starcoder2",
        "starcoder2",
        "Starcoder2ForCausalLM",
        _LAYERS,
        _FRAME + _NORMS + _PLAIN + _VALUE + _rows("ffn_up mlp.c_fc", "ffn_down mlp.c_proj"),
        (
            *_sizes(*_STANDARD_KEYS, norm="norm_epsilon"),
            *_KEY_VALUE_HEADS,
            *_WINDOW,
            ConfigRow("use_bias", "has:blk.0.attn_q.bias"),
        ),
        {"hidden_act": "gelu_pytorch_tanh"},
    ),
    GgufFamily(
        "stablelm",
        "stablelm",
        "StableLmForCausalLM",
        _LAYERS,
        _FRAME
        + _NORMS
        + _PLAIN
        + _VALUE
        + _GATED
        + _rows(
            "attn_q_norm self_attn.q_layernorm.norms.{e} split", "attn_k_norm self_attn.k_layernorm.norms.{e} split"
        ),
        (
            *_sizes(*_STANDARD_KEYS, norm="layer_norm_eps"),
            *_KEY_VALUE_HEADS,
            *_PARALLEL,
            ConfigRow("use_qkv_bias", "has:blk.0.attn_q.bias"),
            ConfigRow("qk_layernorm", "has:blk.0.attn_q_norm.weight"),
        ),
    ),
    GgufFamily(
        "gptneox",
        "gpt_neox",
        "GPTNeoXForCausalLM",
        "gpt_neox.layers.{i}",
        _rows(
            "token_embd gpt_neox.embed_in",
            "output_norm gpt_neox.final_layer_norm",
            "output embed_out",
            "attn_qkv attention.query_key_value qkv_heads",
            "attn_output attention.dense",
        )
        + _NORMS
        + _TWO_LAYER,
        (
            *_sizes(*_STANDARD_KEYS, norm="layer_norm_eps"),
            *_PARALLEL,
            ConfigRow("attention_bias", "has:blk.0.attn_qkv.bias"),
        ),
    ),
    GgufFamily(
        "gpt2",
        "gpt2",
        "GPT2LMHeadModel",
        "transformer.h.{i}",
        _rows(
            "token_embd transformer.wte",
            "position_embd transformer.wpe",
            "output_norm transformer.ln_f",
            "output lm_head",
            "attn_norm ln_1",
            "attn_qkv attn.c_attn transpose",
            "attn_output attn.c_proj transpose",
            "ffn_norm ln_2",
            "ffn_up mlp.c_fc transpose",
            "ffn_down mlp.c_proj transpose",
        ),
        _sizes("n_layer", "n_embd", "n_inner", "n_head", "n_positions", norm="layer_norm_epsilon"),
    ),
    # Falcon 40B and 180B have a norm for the attention and one for the MLP, Falcon 7B one for both.
    GgufFamily(
        "falcon",
        "falcon",
        "FalconForCausalLM",
        "transformer.h.{i}",
        _FALCON + _rows("attn_norm ln_mlp", "attn_norm_2 ln_attn") + _TWO_LAYER,
        _FALCON_CONFIG,
        {"new_decoder_architecture": True, "parallel_attn": True, "multi_query": True, "alibi": False},
        when="has:blk.0.attn_norm_2.weight",
    ),
    GgufFamily(
        "falcon",
        "falcon",
        "FalconForCausalLM",
        "transformer.h.{i}",
        _FALCON + _rows("attn_norm input_layernorm") + _TWO_LAYER,
        _FALCON_CONFIG,
        {"new_decoder_architecture": False, "parallel_attn": True, "multi_query": True, "alibi": False},
    ),
    GgufFamily(
        "bloom",
        "bloom",
        "BloomForCausalLM",
        "transformer.h.{i}",
        _rows(
            "token_embd transformer.word_embeddings",
            "token_embd_norm transformer.word_embeddings_layernorm",
            "output_norm transformer.ln_f",
            "output lm_head",
            "attn_qkv self_attention.query_key_value qkv_heads",
            "attn_output self_attention.dense",
        )
        + _NORMS
        + _TWO_LAYER,
        _sizes("n_layer", "hidden_size", "", "n_head", "seq_length", norm="layer_norm_epsilon"),
    ),
    GgufFamily(
        "mpt",
        "mpt",
        "MptForCausalLM",
        "transformer.blocks.{i}",
        _rows(
            "token_embd transformer.wte",
            "output_norm transformer.norm_f",
            "output lm_head",
            "attn_norm norm_1",
            "attn_qkv attn.Wqkv",
            "attn_output attn.out_proj",
            "ffn_norm norm_2",
            "ffn_up ffn.up_proj",
            "ffn_down ffn.down_proj",
        ),
        _sizes("n_layers", "d_model", "", "n_heads", "max_seq_len", norm="layer_norm_epsilon"),
        {"no_bias": True},
    ),
)
