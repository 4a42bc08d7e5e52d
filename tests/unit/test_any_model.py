"""Models of every kind, not only decoders: packed in a format that is exact, each computes what it computed, and comes back so.

int8_g1_fp32 has a scale for each weight and rounds nothing, so whatever differs is a mistake in how modules are replaced.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

import lowbit
from lowbit.layers import packed_weights

pytestmark = pytest.mark.transformers
EXACT = "int8_g1_fp32"
IDS = torch.arange(3, 15)[None]
PIXELS = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(2))
SIZES: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
WORDS: dict[str, Any] = SIZES | {"vocab_size": 200}
SEQ2SEQ: dict[str, Any] = {"d_model": 64, "vocab_size": 200}
TEXT, BOTH, IMAGE = {"input_ids": IDS}, {"input_ids": IDS, "decoder_input_ids": IDS}, {"pixel_values": PIXELS}
Made = tuple[torch.nn.Module, dict[str, torch.Tensor]]

MODELS: dict[str, Callable[[], Made]] = {
    "albert": lambda: (hf.AlbertForMaskedLM(hf.AlbertConfig(**WORDS, embedding_size=32)), TEXT),
    "bart": lambda: (hf.BartForConditionalGeneration(hf.BartConfig(
        **SEQ2SEQ, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=96, decoder_ffn_dim=96)), BOTH),
    "big_bird": lambda: (hf.BigBirdForMaskedLM(hf.BigBirdConfig(**WORDS, attention_type="original_full")), TEXT),
    "clip": lambda: (hf.CLIPModel(hf.CLIPConfig(
        text_config=WORDS | {"eos_token_id": 14}, vision_config=SIZES | {"image_size": 32, "patch_size": 8})), TEXT | IMAGE),
    "deberta": lambda: (hf.DebertaV2ForMaskedLM(hf.DebertaV2Config(
        **WORDS, relative_attention=True, position_buckets=16)), TEXT),
    "deepseek": lambda: (hf.DeepseekV3ForCausalLM(hf.DeepseekV3Config(
        **WORDS, num_key_value_heads=4, moe_intermediate_size=64, n_routed_experts=8, n_group=2, topk_group=1,
        num_experts_per_tok=2, kv_lora_rank=16, q_lora_rank=32, qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=16,
        first_k_dense_replace=1)), TEXT),
    "jamba": lambda: (hf.JambaForCausalLM(hf.JambaConfig(
        **WORDS, num_key_value_heads=2, use_mamba_kernels=False, attn_layer_period=2, attn_layer_offset=1,
        expert_layer_period=2, expert_layer_offset=1, num_experts=4, mamba_d_state=8)), TEXT),
    "llama4": lambda: (hf.Llama4ForCausalLM(hf.Llama4TextConfig(
        **WORDS, num_key_value_heads=2, num_local_experts=4, head_dim=16, intermediate_size_mlp=96,
        interleave_moe_layer_step=1)), TEXT),
    "mamba": lambda: (hf.MambaForCausalLM(hf.MambaConfig(
        hidden_size=64, num_hidden_layers=2, vocab_size=200, state_size=8)), TEXT),
    "qwen2_vl": lambda: (hf.Qwen2VLForConditionalGeneration(hf.Qwen2VLConfig(
        text_config=WORDS | {"num_key_value_heads": 2, "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}},
        vision_config={"depth": 1, "embed_dim": 32, "num_heads": 2, "hidden_size": 64})), TEXT),
    "rwkv": lambda: (hf.RwkvForCausalLM(hf.RwkvConfig(
        hidden_size=64, num_hidden_layers=2, vocab_size=200, attention_hidden_size=64, intermediate_size=96)), TEXT),
    "segformer": lambda: (hf.SegformerForSemanticSegmentation(hf.SegformerConfig(
        hidden_sizes=[16, 32], depths=[1, 1], num_encoder_blocks=2, num_attention_heads=[1, 2], patch_sizes=[7, 3],
        strides=[4, 2], sr_ratios=[2, 1], mlp_ratios=[2, 2], decoder_hidden_size=32)), IMAGE),
    "t5": lambda: (hf.T5ForConditionalGeneration(hf.T5Config(
        **SEQ2SEQ, d_kv=16, d_ff=96, num_layers=2, num_heads=4)), BOTH),
    "vit": lambda: (hf.ViTForImageClassification(hf.ViTConfig(**SIZES, image_size=32, patch_size=8)), IMAGE),
    "wav2vec2": lambda: (hf.Wav2Vec2ForCTC(hf.Wav2Vec2Config(
        **WORDS, conv_dim=(32, 32), conv_kernel=(10, 3), conv_stride=(5, 2), num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4)), {"input_values": torch.randn(1, 800)}),
    "xlnet": lambda: (hf.XLNetLMHeadModel(hf.XLNetConfig(**SEQ2SEQ, n_layer=2, n_head=4, d_inner=96)), TEXT),
}  # fmt: skip


@torch.no_grad()
def answer(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    found: torch.Tensor = model.eval()(**inputs)[0]
    return found


@pytest.mark.parametrize("name", MODELS)
def test_a_model_computes_the_same_in_an_exact_format(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.05)
    expected = answer(model, inputs)
    packed: Any = lowbit.optimize_model(model, EXACT, embedding=EXACT, conv=EXACT, compute="fp32")
    assert packed.lowbit_report.layers and max(row.error for row in packed.lowbit_report.layers) < 1e-5
    found = answer(packed, inputs)
    assert float((found - expected).norm() / expected.norm()) < 2e-5
    for compact in (True, False):
        packed.save_low_bit(tmp_path / "low", compact=compact)
        again = type(model).from_pretrained(tmp_path / "low")  # type: ignore[attr-defined]
        for held in packed_weights(again).values():
            held.compute = "fp32"
            held.prepare_()
        assert torch.equal(answer(again, inputs), found)
