"""What a config.json and a checkpoint may hold: older spellings, defaults left out, fields that are refused."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from transformers import AutoConfig

from lowbit.errors import CheckpointError, RecipeError
from lowbit.models.families import spec_from_config
from unit.family_cases import CASES, GATED, LONGROPE, TOLERANCE, arrays, prompt, reference_logits, tiny_model
from unit.spec_interpreter import decoder_logits


@pytest.mark.parametrize(
    "name", ["mixtral", "qwen2_moe", "qwen3_moe", "gpt_neox", "bloom", "stablelm, parallel", "gpt2"]
)
def test_saved_files_hold_what_the_spec_looks_for(name: str, tmp_path: Path) -> None:
    model = tiny_model(*CASES[name])
    model.save_pretrained(tmp_path)
    spec = spec_from_config(json.loads((tmp_path / "config.json").read_text()))
    tensors = load_file(tmp_path / "model.safetensors")
    if spec.experts is not None:
        assert any(".experts.0." in tensor for tensor in tensors), "files keep experts apart"
    assert np.abs(decoder_logits(spec, tensors, prompt()) - reference_logits(model)).max() < TOLERANCE


@pytest.mark.parametrize(
    ("name", "new", "old"),
    [
        ("llama", "model.", ""),
        ("bloom", "transformer.", ""),
        ("gpt2", "transformer.", ""),
        ("opt", "model.decoder.", "decoder."),
        ("gpt_neox", "lm_head.", "embed_out."),
        ("gemma3", "model.", "model.language_model."),
        ("gemma3", "model.", "language_model.model."),
    ],
)
def test_older_spellings_are_found(name: str, new: str, old: str) -> None:
    model = tiny_model(*CASES[name])
    spec = spec_from_config(model.config.to_dict())
    renamed = {old + key.removeprefix(new) if key.startswith(new) else key: x for key, x in arrays(model).items()}
    located = spec.locate(renamed)
    assert len(located) == len(spec.outer_weights()) + sum(len(spec.layer_weights(i)) for i in range(len(spec.layers)))
    assert np.abs(decoder_logits(spec, renamed, prompt()) - reference_logits(model)).max() < TOLERANCE


def test_the_text_part_of_gemma3_is_gemma3() -> None:
    text = AutoConfig.for_model(*(CASES["gemma3"][0],), **CASES["gemma3"][1]).to_dict()
    assert spec_from_config({"model_type": "gemma3", "text_config": text}) == spec_from_config(text)


def test_gemma3_configs_that_leave_out_the_defaults() -> None:
    """As published with the 4B model."""
    text = {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    }
    spec = spec_from_config({"model_type": "gemma3", "text_config": text, "eos_token_id": [1, 106]})
    assert (spec.attention.heads, spec.attention.head_dim, spec.vocab_size) == (8, 256, 262208)
    assert spec.tokens.eos == (1, 106)
    sliding, full = spec.layers[0], spec.layers[5]
    assert (sliding.window, full.window) == (1024, None)
    assert sliding.rope is not None and full.rope is not None
    assert (sliding.rope.kind, sliding.rope.theta) == ("default", 1e4)
    assert (full.rope.kind, full.rope.theta, full.rope.factor) == ("linear", 1e6, 8.0)


LLAMA = {"model_type": "llama"} | {name: value for name, value in GATED.items() if value is not None}


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"model_type": "lama"}, "did you mean.*llama"),
        ({}, "no engine for models of type ''"),
        (LLAMA | {"hidden_size": None}, "has no hidden_size"),
        (LLAMA | {"hidden_act": "quick_gelu"}, "no activation 'quick_gelu'"),
        (LLAMA | {"attn_logit_softcapping": 30.0}, "sets attn_logit_softcapping = 30.0"),
        (LLAMA | {"sliding_window": 64}, "sets sliding_window"),
        (LLAMA | {"num_key_value_heads": 4}, "6 query heads cannot share 4 key heads"),
        (LLAMA | {"rope_scaling": {"type": "yarm", "factor": 2.0}}, "did you mean.*yarn"),
        (LLAMA | {"rope_scaling": {"type": "linear", "factor": 2.0, "beta_fast": 32}}, "no field beta_fast"),
        (LLAMA | {"rope_scaling": {"type": "llama3", "factor": 2.0}}, "need high_freq_factor"),
        (LLAMA | {"partial_rotary_factor": 0.5}, "turn all 10 channels"),
        (
            LLAMA | {"model_type": "phi3", "rope_scaling": LONGROPE | {"short_factor": [1.0]}},
            "factor for each of 5 pairs",
        ),
        (LLAMA | {"model_type": "qwen3", "layer_types": ["full_attention"]}, "describes 1 layers and has 3"),
        (
            LLAMA | {"model_type": "qwen3", "layer_types": ["linear_attention"] * 3},
            "no layers of type 'linear_attention'",
        ),
        (LLAMA | {"model_type": "gemma", "use_bidirectional_attention": True}, "use_bidirectional_attention"),
        (LLAMA | {"model_type": "bloom", "apply_residual_connection_post_layernorm": True}, "only with False"),
        (LLAMA | {"model_type": "mpt", "attn_config": {"qk_ln": True}}, "mpt attn_config models with qk_ln = True"),
        (LLAMA | {"model_type": "gpt2", "scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        (
            LLAMA | {"model_type": "mixtral", "num_local_experts": 2, "num_experts_per_tok": 3},
            "cannot choose 3 of 2 experts",
        ),
    ],
)
def test_what_cannot_be_computed_is_refused_in_a_sentence(config: dict[str, Any], sentence: str) -> None:
    with pytest.raises(RecipeError, match=sentence):
        spec_from_config(config)


def test_fields_without_arithmetic_are_passed_over() -> None:
    harmless = {"unsloth_version": "2025.1", "attention_dropout": 0.1, "torch_dtype": "bfloat16", "rope_scaling": None}
    assert spec_from_config(LLAMA | harmless | {"use_sliding_window": False}) == spec_from_config(LLAMA)


# What published configs hold besides: fields of older classes, of training, of remote code.
PUBLISHED: dict[str, dict[str, Any]] = {
    "llama": {"pretraining_tp": 1, "rope_interleaved": False, "is_llama_config": True, "rope_scaling": None},
    "qwen2": {"use_sliding_window": False, "sliding_window": 32768, "max_window_layers": 21, "use_mrope": False},
    "qwen2_moe": {"router_aux_loss_coef": 0.001, "output_router_logits": False, "max_window_layers": 21},
    "qwen3_moe": {"max_window_layers": 48, "use_sliding_window": False, "decoder_sparse_step": 1},
    "smollm3": {"max_window_layers": 28, "use_sliding_window": False, "no_rope_layer_interval": 4, "_attn_mode": None},
    "gemma2": {"hidden_act": "gelu_pytorch_tanh", "cache_implementation": "hybrid"},
    "gemma3_text": {"_sliding_window_pattern": 6, "rope_local_base_freq": 10000, "rope_scaling": None},
    "phi3": {"embd_pdrop": 0.0, "full_attn_mod": 1, "interpolate_factor": 1, "lm_head_bias": False, "mlp_bias": False},
    "starcoder2": {"mlp_type": "default", "norm_type": "layer_norm", "attention_softmax_in_fp32": True},
    "gpt2": {
        "n_ctx": 1024,
        "summary_activation": None,
        "task_specific_params": {"text-generation": {"do_sample": True}},
    },
    "gptj": {"rotary": True, "scale_attn_weights": True, "gradient_checkpointing": False},
    "gpt_neox": {"rotary_emb_base": 10000, "rotary_pct": 0.4, "use_parallel_residual": True},
    "opt": {"prefix": "</s>", "_remove_final_layer_norm": False, "activation_dropout": 0.0},
    "bloom": {
        "offset_alibi": 100,
        "seq_length": 2048,
        "skip_bias_add_qkv": False,
        "n_inner": None,
        "pretraining_tp": 4,
    },
    "mpt": {
        "init_config": {"name": "kaiming_normal_"},
        "learned_pos_emb": True,
        "norm_type": "low_precision_layernorm",
    },
    "falcon": {"apply_residual_connection_post_layernorm": False, "alibi": False, "bias": False},
    "gpt_oss": {
        "initial_context_length": 4096,
        "experts_per_token": 2,
        "swiglu_limit": 7.0,
    },
}


@pytest.mark.parametrize("model_type", PUBLISHED)
def test_published_configs_are_understood(model_type: str) -> None:
    sizes = next(fields for case, fields in CASES.values() if case == model_type)
    spec = spec_from_config(sizes | {"model_type": model_type} | PUBLISHED[model_type])
    assert spec.family == model_type
    if model_type.startswith(("qwen", "smollm")):
        assert all(layer.window is None for layer in spec.layers), "a window that is not asked for is not used"


def test_a_lost_weight_is_named() -> None:
    model = tiny_model(*CASES["llama, biases, wide heads"])
    spec = spec_from_config(model.config.to_dict())
    for lost in ("model.layers.1.mlp.up_proj.weight", "model.layers.2.self_attn.k_proj.bias", "lm_head.weight"):
        names = set(arrays(model)) - {lost}
        with pytest.raises(CheckpointError, match=lost):
            spec.locate(names)


def test_a_lost_expert_is_named(tmp_path: Path) -> None:
    model = tiny_model(*CASES["mixtral"])
    model.save_pretrained(tmp_path)
    names = set(load_file(tmp_path / "model.safetensors"))
    lost = next(name for name in names if "layers.1." in name and "experts.4.w3" in name)
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.experts\.4\.w3\.weight"):
        spec_from_config(model.config.to_dict()).locate(names - {lost})


def test_fused_rows_are_a_permutation() -> None:
    for name in ("falcon, two norms", "bloom", "phi3"):
        attention = spec_from_config(tiny_model(*CASES[name]).config.to_dict()).attention
        rows = np.concatenate(attention.qkv_rows())
        assert sorted(rows) == list(range(attention.q_size + 2 * attention.kv_size))


def test_specs_need_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; sys.modules.update(torch=None, transformers=None)\n"
        "from lowbit.models.families import spec_from_config\n"
        f"print(spec_from_config({LLAMA!r}).attention.heads)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "6", done.stderr
