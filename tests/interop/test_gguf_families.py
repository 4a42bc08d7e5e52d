"""Every family: a tiny random model -> GGUF as llama.cpp would write it -> Hugging Face folder -> the same logits.

Equal logits check the names, the layouts and the config at once. Weights are stored as F32, so equality is exact.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.numpy import load_file

from interop.gguf_writing import byte_level_vocabulary, convert_weights, write_gguf
from lowbit.errors import CheckpointError
from lowbit.interop.gguf import open_gguf, write_hf_folder
from lowbit.models.gguf_names import FAMILIES

VOCABULARY = 300
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
HEAD_DIM = {"head_dim": 32}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "long_factor": [1.0 + 0.25 * i for i in range(8)],
    "short_factor": [1.0 + 0.125 * i for i in range(8)],
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
GPT = {"vocab_size": VOCABULARY, "n_positions": 128, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_inner": 256}
FALCON = {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}

# (case, GGUF architecture, transformers' config class, its arguments)
CASES: list[tuple[str, str, str, dict[str, Any]]] = [
    ("llama", "llama", "LlamaConfig", SIZES),
    ("llama head_dim", "llama", "LlamaConfig", SIZES | HEAD_DIM | {"tie_word_embeddings": True}),
    ("llama biases", "llama", "LlamaConfig", SIZES | {"attention_bias": True, "mlp_bias": True}),
    ("llama 3 rope", "llama", "LlamaConfig", SIZES | HEAD_DIM | {"rope_parameters": LLAMA3}),
    ("llama yarn", "llama", "LlamaConfig", SIZES | {"rope_parameters": YARN}),
    ("smollm3", "smollm3", "SmolLM3Config", SIZES | {"num_hidden_layers": 4}),
    ("granite", "granite", "GraniteConfig", SIZES | {"attention_multiplier": 0.25, "logits_scaling": 4.0}),
    ("mixtral", "llama", "MixtralConfig", SIZES | {"num_local_experts": 4}),
    ("qwen2", "qwen2", "Qwen2Config", SIZES),
    ("qwen2moe", "qwen2moe", "Qwen2MoeConfig", SIZES | EXPERTS | {"shared_expert_intermediate_size": 64}),
    ("qwen3", "qwen3", "Qwen3Config", SIZES | HEAD_DIM),
    ("qwen3moe", "qwen3moe", "Qwen3MoeConfig", SIZES | EXPERTS | HEAD_DIM | {"norm_topk_prob": True}),
    ("phi3", "phi3", "Phi3Config", SIZES),
    ("phi3 longrope", "phi3", "Phi3Config", SIZES | {"rope_parameters": LONG, "original_max_position_embeddings": 32}),
    ("gemma", "gemma", "GemmaConfig", SIZES | HEAD_DIM),
    ("gemma2", "gemma2", "Gemma2Config", SIZES | HEAD_DIM | {"query_pre_attn_scalar": 32, "sliding_window": 8}),
    (
        "gemma3",
        "gemma3",
        "Gemma3TextConfig",
        SIZES | HEAD_DIM | {"query_pre_attn_scalar": 32, "sliding_window": 8, "num_hidden_layers": 7},
    ),
    ("olmo2", "olmo2", "Olmo2Config", SIZES),
    ("starcoder2", "starcoder2", "Starcoder2Config", SIZES),
    ("stablelm", "stablelm", "StableLmConfig", SIZES | {"use_qkv_bias": True}),
    ("stablelm 12b", "stablelm", "StableLmConfig", SIZES | {"qk_layernorm": True, "use_parallel_residual": True}),
    ("gptneox", "gptneox", "GPTNeoXConfig", SIZES),
    ("gpt2", "gpt2", "GPT2Config", GPT),
    ("falcon 7b", "falcon", "FalconConfig", FALCON),
    ("falcon 40b", "falcon", "FalconConfig", FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2}),
    ("bloom", "bloom", "BloomConfig", {"vocab_size": VOCABULARY, "hidden_size": 64, "n_layer": 2, "n_head": 4}),
    ("mpt", "mpt", "MptConfig", {"vocab_size": VOCABULARY, "d_model": 64, "n_layers": 2, "n_heads": 4}),
]

# GGUF key <- the first of these attributes that the config has
KEYS = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size n_inner ffn_hidden_size",
    "context_length": "max_position_embeddings max_seq_len seq_length",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads num_kv_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.layer_norm_epsilon": "layer_norm_eps layer_norm_epsilon norm_epsilon",
    "attention.key_length": "head_dim",
    "attention.sliding_window": "sliding_window",
    "attention.scale": "attention_multiplier",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling",
    "expert_count": "num_local_experts num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "use_parallel_residual": "use_parallel_residual",
}
BY_FAMILY = {"mpt": {"attention.max_alibi_bias": 8.0}}


def metadata_of(architecture: str, config: Any) -> dict[str, Any]:
    """The metadata llama.cpp's converters write for this config."""
    metadata: dict[str, Any] = {}
    for key, names in KEYS.items():
        value = next((getattr(config, name) for name in names.split() if getattr(config, name, None) is not None), None)
        if value is not None:
            metadata[key] = value
    metadata.setdefault("feed_forward_length", 4 * config.hidden_size)
    metadata.setdefault("context_length", 128)
    metadata.update(BY_FAMILY.get(architecture, {}))
    if architecture == "falcon" and not config.new_decoder_architecture:
        metadata["attention.head_count_kv"] = 1
    rope = getattr(config, "rope_parameters", None) or {}
    full = rope.get("full_attention", rope)
    if full:
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        metadata["rope.freq_base"] = full["rope_theta"]
        metadata["rope.dimension_count"] = int(head * full.get("partial_rotary_factor", 1.0))
    if "sliding_attention" in rope:
        metadata["rope.freq_base_swa"] = rope["sliding_attention"]["rope_theta"]
    if full.get("rope_type") == "yarn":
        metadata |= {"rope.scaling.type": "yarn", "rope.scaling.factor": full["factor"]}
        metadata["rope.scaling.original_context_length"] = full["original_max_position_embeddings"]
    if full.get("rope_type") == "longrope":
        metadata |= {"rope.scaling.type": "longrope", "rope.scaling.original_context_length": 32}
    return metadata


def rope_tensors(config: Any) -> dict[str, Any]:
    """The tensors that carry rotary scaling."""
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        return {
            f"rope_factors_{kind}.weight": torch.tensor(rope[f"{kind}_factor"]).numpy() for kind in ("long", "short")
        }
    if rope.get("rope_type") != "llama3":
        return {}
    plain = 1.0 / (rope["rope_theta"] ** (torch.arange(0, config.head_dim, 2) / config.head_dim))
    scaled, _ = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    return {"rope_freqs.weight": (plain / scaled).numpy()}


def make_model(config: Any) -> Any:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        # Norms start at 1 and biases at 0, which would hide a wrong name or a forgotten offset.
        for parameter in model.parameters():
            parameter.copy_(parameter + 0.05 * torch.randn_like(parameter))
    return model


@pytest.mark.transformers
@pytest.mark.parametrize(("case", "architecture", "config_class", "arguments"), CASES, ids=[case[0] for case in CASES])
def test_family(tmp_path: Path, case: str, architecture: str, config_class: str, arguments: dict[str, Any]) -> None:
    config = getattr(transformers, config_class)(**arguments, pad_token_id=None, bos_token_id=1, eos_token_id=2)
    model = make_model(config)
    model.save_pretrained(tmp_path / "original")
    weights = load_file(tmp_path / "original" / "model.safetensors")
    tensors = convert_weights(architecture, config, weights) | rope_tensors(config)
    metadata = metadata_of(architecture, config) | byte_level_vocabulary(VOCABULARY)
    path = write_gguf(tmp_path / "model.gguf", architecture, metadata, tensors)

    folder = write_hf_folder(path, tmp_path / "folder", "float32", max_shard_bytes=100_000)
    assert set(open_gguf(path).tensors) == set(weights)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    assert type(loaded) is type(model)
    tokens = torch.arange(3, 3 + 24)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits, rtol=0, atol=1e-6)


def test_every_row_has_a_case() -> None:
    cases = {
        (architecture, getattr(transformers, config_class).model_type) for _, architecture, config_class, _ in CASES
    }
    assert {(family.architecture, family.model_type) for family in FAMILIES} == cases


def test_unknown_architecture_lists_the_known(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "x.gguf", "mamba", {"block_count": 1}, {})
    with pytest.raises(CheckpointError, match=r"'mamba'.*known are bloom, falcon"):
        open_gguf(path)


def test_shards_are_indexed(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(**SIZES, pad_token_id=None)
    weights = {name: weight.numpy() for name, weight in make_model(config).state_dict().items()}
    metadata = metadata_of("llama", config) | byte_level_vocabulary(VOCABULARY)
    path = write_gguf(tmp_path / "model.gguf", "llama", metadata, convert_weights("llama", config, weights))
    folder = write_hf_folder(path, tmp_path / "folder", "float32", max_shard_bytes=60_000)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(weights)
    assert index["metadata"]["total_size"] == sum(weight.nbytes for weight in weights.values())
    assert {path.name for path in folder.glob("*.safetensors")} == set(index["weight_map"].values())
