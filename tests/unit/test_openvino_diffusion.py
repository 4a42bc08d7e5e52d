"""Pictures from tiny random pipelines: the same from torch and from OpenVINO for the same seed."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

from lowbit.errors import CheckpointError, LowbitError
from lowbit.openvino.opening import EXACT
from lowbit.openvino.sites import low_bit_weights

diffusers = pytest.importorskip("diffusers", reason="the package diffusers is not installed")
diffusion = importlib.import_module("lowbit.openvino.diffusion")

CLOSE = 2e-4  # of colours from 0 to 1: four steps of guidance make each rounding of a sum larger
CALL = {"num_inference_steps": 4, "guidance_scale": 5.0, "output_type": "np"}


def tokenizer() -> Any:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: place for place, letter in enumerate([*letters, "<|startoftext|>", "<|endoftext|>"])}
    held = Tokenizer(models.BPE(vocabulary, []))
    held.pre_tokenizer = pre_tokenizers.ByteLevel()
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=held, model_max_length=16, **special)


def text_encoder(kind: Any) -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}
    tokens = {"vocab_size": 258, "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 257}
    return kind(transformers.CLIPTextConfig(**sizes, **tokens, max_position_embeddings=16, projection_dim=32)).eval()


def parts(**unet: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    blocks = {"block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8, "sample_size": 8}
    down, up = ("DownBlock2D", "CrossAttnDownBlock2D"), ("CrossAttnUpBlock2D", "UpBlock2D")
    sides = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    return {
        "unet": diffusers.UNet2DConditionModel(down_block_types=down, up_block_types=up, **blocks, **unet).eval(),
        "vae": diffusers.AutoencoderKL(
            block_out_channels=[16, 32], latent_channels=4, norm_num_groups=8, **sides
        ).eval(),
        "scheduler": diffusers.DDIMScheduler(),
        "text_encoder": text_encoder(transformers.CLIPTextModel),
        "tokenizer": tokenizer(),
    }


def small() -> Any:
    made = diffusers.StableDiffusionPipeline(
        **parts(cross_attention_dim=32), safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    return made


def large() -> Any:
    further = {
        "addition_embed_type": "text_time", "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 80,
        "transformer_layers_per_block": 1, "cross_attention_dim": 64,
    }  # fmt: skip
    second = {"text_encoder_2": text_encoder(transformers.CLIPTextModelWithProjection), "tokenizer_2": tokenizer()}
    return diffusers.StableDiffusionXLPipeline(**parts(**further), **second, add_watermarker=False)


PIPELINES = {"small": (small, "OVStableDiffusionPipeline"), "large": (large, "OVStableDiffusionXLPipeline")}


def picture(pipeline: Any, seed: int = 3, **named: Any) -> np.ndarray:
    pipeline.pipeline.set_progress_bar_config(disable=True) if hasattr(pipeline, "parts") else None
    made = pipeline("a cat", generator=torch.Generator().manual_seed(seed), **(CALL | named)).images
    return np.asarray(made)


@pytest.mark.slow
@pytest.mark.parametrize("name", PIPELINES)
def test_pictures_are_those_of_torch(name: str, tmp_path: Path) -> None:
    make, kind = PIPELINES[name]
    original = make()
    original.set_progress_bar_config(disable=True)
    original.save_pretrained(tmp_path / "torch")
    side = {"height": 24, "width": 16}
    pipeline = getattr(diffusion, kind).from_pretrained(tmp_path / "torch", export=True, ov_config=EXACT)
    for named in ({}, side, {"num_images_per_prompt": 2}):
        np.testing.assert_allclose(picture(pipeline, **named), picture(original, **named), rtol=0, atol=CLOSE)
    assert np.abs(picture(pipeline, seed=4) - picture(pipeline)).max() > 0.05
    pipeline.save_pretrained(tmp_path / "graphs")
    again = diffusion.OVDiffusionPipeline.from_pretrained(tmp_path / "graphs", ov_config=EXACT)
    assert type(again.pipeline).__name__ == type(original).__name__
    np.testing.assert_array_equal(picture(again), picture(pipeline))


@pytest.mark.slow
def test_bits_schedulers_and_pictures_to_begin_with(tmp_path: Path) -> None:
    original = small()
    original.set_progress_bar_config(disable=True)
    original.save_pretrained(tmp_path / "torch")
    pipeline = diffusion.OVDiffusionPipeline.from_pretrained(tmp_path / "torch", export=True, ov_config=EXACT)
    pipeline.save_pretrained(tmp_path / "graphs")
    eight = diffusion.OVDiffusionPipeline.from_pretrained(tmp_path / "graphs", load_in_8bit=True, ov_config=EXACT)
    assert all(low_bit_weights(part.model) for part in eight.parts.values())
    assert 0 < np.abs(picture(eight) - picture(original)).mean() < 0.02
    original.scheduler = diffusers.EulerDiscreteScheduler.from_config(original.scheduler.config)
    pipeline.scheduler = original.scheduler
    np.testing.assert_allclose(picture(pipeline), picture(original), rtol=0, atol=CLOSE)
    begun = Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8))
    named = {"image": begun, "strength": 0.75}
    expected = diffusers.StableDiffusionImg2ImgPipeline(**original.components, requires_safety_checker=False)
    expected.set_progress_bar_config(disable=True)
    found = diffusion.OVStableDiffusionImg2ImgPipeline.from_pretrained(tmp_path / "graphs", ov_config=EXACT)
    found.scheduler = original.scheduler
    np.testing.assert_allclose(picture(found, **named), picture(expected, **named), rtol=0, atol=CLOSE)
    with pytest.raises(LowbitError, match="clip_skip reads inside of the text encoder"):
        pipeline("a cat", clip_skip=1)


@pytest.mark.parametrize("name", ["here", "nowhere"])
def test_what_is_no_pipeline_is_a_sentence(tmp_path: Path, name: str) -> None:
    (tmp_path / "here").mkdir()
    with pytest.raises(
        CheckpointError,
        match=rf"{name} cannot be opened as a pipeline of diffusers \(.*\): name a folder with model_index",
    ):
        diffusion.OVStableDiffusionPipeline.from_pretrained(tmp_path / name)


def test_a_pipeline_without_such_a_unet_is_refused(tmp_path: Path) -> None:
    unet = diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        norm_num_groups=4,
    )
    with pytest.raises(LowbitError, match=r"DDPMPipeline has no U-Net that looks at text: lowbit.openvino.trace"):
        diffusion.export_pipeline(diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler()), tmp_path, None)
