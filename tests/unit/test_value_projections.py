"""The default recipe gives attention values more bits under whatever name, and says where it cannot."""

import re

import pytest
import torch
import transformers

from lowbit.models import names
from lowbit.quantize import quantize_
from lowbit.recipe import FUSED_VALUES, VALUES, recipe_named
from lowbit.report import Report

SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "vocab_size": 96,
    "intermediate_size": 128,
}
APART = {
    "llama": (transformers.LlamaConfig(**SMALL), "self_attn.v_proj"),
    "gptj": (transformers.GPTJConfig(n_embd=64, n_layer=1, n_head=4, rotary_dim=8, vocab_size=96), "attn.v_proj"),
    "bert": (transformers.BertConfig(**SMALL), "attention.self.value"),
    "vit": (transformers.ViTConfig(**SMALL, image_size=32), "value|v_proj"),
    "distilbert": (
        transformers.DistilBertConfig(dim=64, n_layers=1, n_heads=4, hidden_dim=128, vocab_size=96),
        "attention.v_lin",
    ),
    "deberta": (
        transformers.DebertaV2Config(**SMALL, max_position_embeddings=64, type_vocab_size=0),
        "attention.self.value_proj",
    ),
    "t5": (
        transformers.T5Config(d_model=64, d_kv=16, num_heads=4, num_layers=1, d_ff=128, vocab_size=96),
        r"(SelfAttention|EncDecAttention)\.v",
    ),
}
FUSED = {
    "gpt_neox": (transformers.GPTNeoXConfig(**SMALL), "query_key_value"),
    "phi3": (transformers.Phi3Config(**SMALL, pad_token_id=0), "qkv_proj"),
    "gpt2": (transformers.GPT2Config(n_embd=64, n_layer=1, n_head=4, vocab_size=96), "c_attn"),
    "gpt_bigcode": (transformers.GPTBigCodeConfig(n_embd=64, n_layer=1, n_head=4, vocab_size=96), "c_attn"),
    "falcon": (transformers.FalconConfig(**SMALL), "query_key_value"),
    "bloom": (transformers.BloomConfig(hidden_size=64, n_layer=1, n_head=4, vocab_size=96), "query_key_value"),
    "mpt": (transformers.MptConfig(d_model=64, n_layers=1, n_heads=4, vocab_size=96), "Wqkv"),
}


def report_of(config: transformers.PreTrainedConfig) -> Report:
    torch.manual_seed(0)
    return quantize_(transformers.AutoModel.from_config(config), recipe_named("int4"))


@pytest.mark.parametrize("family", APART)
def test_values_of_their_own_have_six_bits(family: str) -> None:
    config, name = APART[family]
    report = report_of(config)
    values = [row for row in report.layers if re.search(rf"(^|\.)({name})$", row.path)]
    assert values and {row.format for row in values} == {"int6"}
    assert {row.format for row in report.layers if row.role == "linear" and row not in values} == {"int4"}
    assert not [row.note for row in report.layers if row.note]


@pytest.mark.parametrize("family", FUSED)
def test_fused_values_keep_the_format_of_linears_and_the_report_says_so(family: str) -> None:
    config, name = FUSED[family]
    report = report_of(config)
    fused = [row for row in report.layers if row.path.endswith(name)]
    assert fused and {row.format for row in fused} == {"int4"}
    assert all("values share this weight" in row.note for row in fused)
    assert not [row.path for row in report.layers if row.format == "int6"]


def test_every_dialect_of_the_families_is_known() -> None:
    dialects = [value for value in vars(names).values() if isinstance(value, names.Names)]
    assert len(dialects) > 10
    for dialect in dialects:
        for role, pattern in (("v", VALUES), ("qkv", FUSED_VALUES)):
            if role in dialect.inside:
                assert re.search(pattern, dialect.layer.format(layer=0) + dialect.inside[role]), dialect.inside[role]


def test_other_weights_are_not_taken_for_values() -> None:
    for path in (
        "rwkv.blocks.0.feed_forward.value",
        "layers.0.mlp.up_proj",
        "value_head",
        "layers.0.self_attn.kv_norm",
    ):
        assert not re.search(VALUES, path) and not re.search(FUSED_VALUES, path), path


def test_notes_travel_with_the_recipe() -> None:
    recipe = recipe_named("int4")
    assert recipe.notes and type(recipe).from_dict(recipe.to_dict()) == recipe
