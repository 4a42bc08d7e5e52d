"""Tiny random models of every family, for tests: small enough to build and run in a fraction of a second.

A family is one row: how transformers names it, and what its config needs beyond the common sizes. The weights are not
transformers' initialisation (small matrices, zero biases, norms of one), under which a lost bias or a swapped norm
changes nothing that a test could see: matrices get a standard deviation of 1/sqrt(last axis), vectors what they had
plus 0.1 N(0, 1), each from a seed made of its name.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowbit_assets.cache import seed_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>")  # their numbers are 0, 1, 2
VOCABULARY = 288  # the specials, 256 bytes, and some that no text reaches
VECTOR_NOISE = 0.1
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ bos_token + message['role'] + ': ' + message['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ bos_token + 'assistant: ' }}{% endif %}"
)

COMMON: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GATED: dict[str, Any] = {"num_key_value_heads": 2, "intermediate_size": 160}
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 96}

# Widths that no group of 32, 64 or 128 divides; a family takes those that its row or COMMON names.
AWKWARD: dict[str, int] = {
    "hidden_size": 72,
    "word_embed_proj_dim": 72,
    "intermediate_size": 200,
    "ffn_dim": 200,
    "moe_intermediate_size": 100,
    "shared_expert_intermediate_size": 100,
}


@dataclass(frozen=True)
class Family:
    """A row of the table: the model type of transformers and what its config gets on top of the common sizes."""

    model_type: str
    extra: dict[str, Any] = field(default_factory=dict)


FAMILIES: dict[str, Family] = {
    "llama": Family("llama", GATED),
    "mistral": Family("mistral", GATED | {"head_dim": 16, "sliding_window": 8}),
    "qwen2": Family("qwen2", GATED),
    "qwen3": Family("qwen3", GATED | {"head_dim": 16}),
    "qwen2_moe": Family("qwen2_moe", GATED | EXPERTS | {"shared_expert_intermediate_size": 96}),
    "qwen3_moe": Family("qwen3_moe", GATED | EXPERTS | {"head_dim": 16, "norm_topk_prob": True}),
    "mixtral": Family("mixtral", GATED | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "phi3": Family("phi3", GATED),
    "gemma2": Family("gemma2", GATED | {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8}),
    "gemma3": Family(
        "gemma3_text",
        GATED | {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8, "sliding_window_pattern": 2},
    ),
    "smollm3": Family("smollm3", GATED | {"num_hidden_layers": 4}),  # its fourth layer has no rope
    "olmo2": Family("olmo2", GATED),
    "granite": Family(
        "granite",
        GATED
        | {"embedding_multiplier": 12.0, "logits_scaling": 4.0, "residual_multiplier": 0.22}
        | {"attention_multiplier": 0.0625},
    ),
    "gpt2": Family("gpt2"),
    "opt": Family("opt", {"ffn_dim": 160, "word_embed_proj_dim": 64}),
    "bloom": Family("bloom"),
    "mpt": Family("mpt"),
    "gpt_neox": Family("gpt_neox", {"intermediate_size": 160}),
}


def tiny_model(family: str, folder: Path, seed: int = 0, awkward: bool = False, **overrides: object) -> Path:
    """Save a tiny random model of a family and a byte tokenizer as a Hugging Face folder; returns the folder."""
    tiny_model_in_memory(family, seed, awkward, **overrides).save_pretrained(folder)
    write_byte_tokenizer(folder)
    return folder


def tiny_model_in_memory(family: str, seed: int = 0, awkward: bool = False, **overrides: object) -> "PreTrainedModel":
    """A tiny random model of a family in float32, ready to run.

    `awkward` gives it widths that no common group size divides; `overrides` are fields of its config.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    if family not in FAMILIES:
        raise ValueError(f"no tiny model is of family {family!r}; there are {', '.join(FAMILIES)}")
    row = FAMILIES[family]
    fields = COMMON | row.extra
    if awkward:
        fields |= {name: width for name, width in AWKWARD.items() if name in fields}
    config = AutoConfig.for_model(row.model_type, **fields | overrides)
    with torch.random.fork_rng(devices=[]):  # the caller's random numbers stay as they were
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            generator.manual_seed(seed_of(seed, name) >> 1)  # torch takes 63 bits
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(noise * VECTOR_NOISE)
    return model.eval()


def write_byte_tokenizer(folder: Path) -> None:
    """A tokenizer of single bytes, three special tokens and a chat template: it encodes any text, reversibly."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*SPECIAL_TOKENS, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    tokenizer.save(str(folder / "tokenizer.json"))
    pad, bos, eos = SPECIAL_TOKENS
    fields = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": pad,
        "bos_token": bos,
        "eos_token": eos,
        "chat_template": CHAT_TEMPLATE,
        "model_max_length": COMMON["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(fields, indent=2) + "\n")
