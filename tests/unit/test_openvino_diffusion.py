"""Pictures from tiny random pipelines: the same from torch and from OpenVINO for the same seed."""

from __future__ import annotations

import copy
import importlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

import lowbit
from lowbit.compat import optimum_export
from lowbit.errors import CheckpointError, LowbitError, MissingPackageError, RecipeError
from lowbit.openvino.opening import EXACT
from lowbit.openvino.sites import low_bit_weights

diffusers = pytest.importorskip("diffusers", reason="the package diffusers is not installed")
diffusion = importlib.import_module("lowbit.openvino.diffusion")
exporting = importlib.import_module("lowbit.openvino.picture_export")
verify_pipeline = importlib.import_module("lowbit.openvino.picture_comparison").verify_pipeline

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


def small(**unet: Any) -> Any:
    around = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return diffusers.StableDiffusionPipeline(**parts(cross_attention_dim=32, **unet), **around)


def large() -> Any:
    further = {
        "addition_embed_type": "text_time", "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 80,
        "transformer_layers_per_block": 1, "cross_attention_dim": 64,
    }  # fmt: skip
    second = {"text_encoder_2": text_encoder(transformers.CLIPTextModelWithProjection), "tokenizer_2": tokenizer()}
    return diffusers.StableDiffusionXLPipeline(**parts(**further), **second, add_watermarker=False)


def few_steps() -> Any:
    made = parts(cross_attention_dim=32, time_cond_proj_dim=32)
    made["scheduler"] = diffusers.LCMScheduler()
    around = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return diffusers.LatentConsistencyModelPipeline(**made, **around)


def long_text_encoder() -> Any:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 258}
    return transformers.T5EncoderModel(transformers.T5Config(**sizes)).eval()


def flat_vae(channels: int) -> Any:
    plain = {"use_quant_conv": False, "use_post_quant_conv": False, "shift_factor": 0.06, "scaling_factor": 1.5}
    sizes = {"block_out_channels": (8,), "norm_num_groups": 2, "latent_channels": channels}
    return diffusers.AutoencoderKL(**sizes, **plain).eval()


def stable_diffusion_3() -> Any:
    torch.manual_seed(0)
    heads = {"attention_head_dim": 8, "num_attention_heads": 4, "num_layers": 2, "caption_projection_dim": 32}
    widths = {"in_channels": 4, "out_channels": 4, "joint_attention_dim": 32, "pooled_projection_dim": 64}
    return diffusers.StableDiffusion3Pipeline(
        transformer=diffusers.SD3Transformer2DModel(sample_size=16, patch_size=1, **heads, **widths).eval(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=flat_vae(4),
        text_encoder=text_encoder(transformers.CLIPTextModelWithProjection),
        tokenizer=tokenizer(),
        text_encoder_2=text_encoder(transformers.CLIPTextModelWithProjection),
        tokenizer_2=tokenizer(),
        text_encoder_3=long_text_encoder(),
        tokenizer_3=tokenizer(),
    )


def flux() -> Any:
    torch.manual_seed(0)
    heads = {"attention_head_dim": 16, "num_attention_heads": 2, "num_layers": 1, "num_single_layers": 1}
    widths = {"patch_size": 1, "in_channels": 4, "joint_attention_dim": 32, "pooled_projection_dim": 32}
    rotary = {"axes_dims_rope": (4, 4, 8), "guidance_embeds": True}
    return diffusers.FluxPipeline(
        transformer=diffusers.FluxTransformer2DModel(**heads, **widths, **rotary).eval(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=flat_vae(1),
        text_encoder=text_encoder(transformers.CLIPTextModel),
        tokenizer=tokenizer(),
        text_encoder_2=long_text_encoder(),
        tokenizer_2=tokenizer(),
    )


# What makes a pipeline, its class of ours, and what its call is given beside CALL.
PIPELINES: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "small": (small, "OVStableDiffusionPipeline", {}),
    "large": (large, "OVStableDiffusionXLPipeline", {}),
    "few steps": (few_steps, "OVLatentConsistencyModelPipeline", {}),
    "three encoders": (stable_diffusion_3, "OVStableDiffusion3Pipeline", {"height": 16, "width": 16}),
    "flux": (flux, "OVFluxPipeline", {"height": 16, "width": 16, "max_sequence_length": 16}),
}
# Those that begin with a picture, by their pipelines.
BEGINNINGS = {
    "small": ("OVStableDiffusionImg2ImgPipeline", "OVStableDiffusionInpaintPipeline"),
    "large": ("OVStableDiffusionXLImg2ImgPipeline", "OVStableDiffusionXLInpaintPipeline"),
}


def picture(pipeline: Any, seed: int = 3, **named: Any) -> np.ndarray:
    getattr(pipeline, "pipeline", pipeline).set_progress_bar_config(disable=True)
    made = pipeline("a cat", generator=torch.Generator().manual_seed(seed), **(CALL | named)).images
    return np.asarray(made)


def are_alike(ours: Any, theirs: Any, **named: Any) -> None:
    np.testing.assert_allclose(picture(ours, **named), picture(theirs, **named), rtol=0, atol=CLOSE)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Folders of torch and of graphs by the name of a pipeline, each made once."""
    made: dict[str, tuple[Path, Path]] = {}

    def folders(name: str) -> tuple[Path, Path]:
        if name not in made:
            place = tmp_path_factory.mktemp("pipeline")
            PIPELINES[name][0]().save_pretrained(place / "torch")
            load = getattr(diffusion, PIPELINES[name][1]).from_pretrained
            load(place / "torch", export=True, compile=False).save_pretrained(place / "graphs")
            made[name] = place / "torch", place / "graphs"
        return made[name]

    return folders


@pytest.mark.slow
@pytest.mark.parametrize("name", PIPELINES)
def test_pictures_are_those_of_torch(name: str, exported: Any) -> None:
    torch_folder, graphs = exported(name)
    given = PIPELINES[name][2]
    original = diffusers.DiffusionPipeline.from_pretrained(torch_folder)
    pipeline = getattr(diffusion, PIPELINES[name][1]).from_pretrained(graphs, ov_config=EXACT)
    for named in ({}, {"height": 24, "width": 16}, {"num_images_per_prompt": 2}, {"num_inference_steps": 3}):
        are_alike(pipeline, original, **(given | named))
    assert np.abs(picture(pipeline, seed=4, **given) - picture(pipeline, **given)).max() > 0.05
    again = diffusion.OVDiffusionPipeline.from_pretrained(graphs, ov_config=EXACT)
    assert type(again.pipeline).__name__ == type(original).__name__
    np.testing.assert_array_equal(picture(again, **given), picture(pipeline, **given))


def begun() -> dict[str, Any]:
    draw = np.random.default_rng(0)
    mask = np.zeros((16, 16), np.uint8)
    mask[4:12, 2:9] = 255
    return {
        "image": Image.fromarray(draw.integers(0, 255, (16, 16, 3), dtype=np.uint8)),
        "mask_image": Image.fromarray(mask),
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", BEGINNINGS)
def test_pictures_to_begin_with(name: str, exported: Any) -> None:
    torch_folder, graphs = exported(name)
    original = diffusers.DiffusionPipeline.from_pretrained(torch_folder)
    whole = begun()
    image = {"image": whole["image"], "strength": 0.75}
    hole = whole | {"strength": 0.9, "height": 16, "width": 16}
    for kind, auto, any_kind, named in zip(
        BEGINNINGS[name],
        (diffusers.AutoPipelineForImage2Image, diffusers.AutoPipelineForInpainting),
        (diffusion.OVPipelineForImage2Image, diffusion.OVPipelineForInpainting),
        (image, hole),
        strict=True,
    ):
        theirs = auto.from_pipe(original)
        ours = getattr(diffusion, kind).from_pretrained(graphs, ov_config=EXACT)
        assert type(ours.pipeline) is type(theirs)
        are_alike(ours, theirs, **named)
        same = any_kind.from_pretrained(graphs, ov_config=EXACT)
        np.testing.assert_array_equal(picture(same, **named), picture(ours, **named))
    back = diffusion.OVPipelineForText2Image.from_pretrained(graphs, ov_config=EXACT)
    assert type(back.pipeline) is type(original)


@pytest.mark.slow
def test_a_unet_that_is_made_for_holes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nine channels: what there is, the mask, and what lies under it. All parts count as large, and stay as they are when told."""
    made = small(in_channels=9)
    theirs = diffusers.StableDiffusionInpaintPipeline(**made.components, requires_safety_checker=False)
    theirs.save_pretrained(tmp_path)
    monkeypatch.setattr(exporting, "LARGE", 10)
    load = diffusion.OVStableDiffusionInpaintPipeline.from_pretrained
    ours = load(tmp_path, export=True, load_in_8bit=False, ov_config=EXACT)
    are_alike(ours, theirs, **begun(), height=16, width=16)
    assert not any(low_bit_weights(part.model) for part in ours.parts.values())


@pytest.mark.slow
def test_bits_schedulers_and_copies(exported: Any, tmp_path: Path) -> None:
    torch_folder, graphs = exported("small")
    original = diffusers.DiffusionPipeline.from_pretrained(torch_folder)
    pipeline = diffusion.OVDiffusionPipeline.from_pretrained(graphs, ov_config=EXACT)
    eight = diffusion.OVDiffusionPipeline.from_pretrained(graphs, load_in_8bit=True, ov_config=EXACT)
    assert all(low_bit_weights(part.model) for part in eight.parts.values())
    assert 0 < np.abs(picture(eight) - picture(original)).mean() < 0.02
    # Steps between whole numbers, which this scheduler takes: 749.25, 499.5, ...
    config = original.scheduler.config
    original.scheduler = diffusers.EulerDiscreteScheduler.from_config(config, timestep_spacing="linspace")
    copied = copy.deepcopy(pipeline)
    pipeline.scheduler = original.scheduler
    are_alike(pipeline, original, num_inference_steps=5)
    # The copy has its own scheduler and its own graphs.
    assert np.abs(picture(copied) - picture(pipeline)).max() > 0.01
    before = picture(copied)
    other = copy.deepcopy(copied)
    other.half().save_pretrained(tmp_path / "half")
    sizes = [(folder / "unet" / "openvino_model.bin").stat().st_size for folder in (tmp_path / "half", graphs)]
    assert sizes[0] < 0.6 * sizes[1]
    np.testing.assert_array_equal(picture(copied), before)
    assert 0 < np.abs(picture(other) - before).max() < 0.05


@pytest.mark.slow
def test_parts_are_exchanged_like_those_of_diffusers(exported: Any, tmp_path: Path) -> None:
    """A checker that blackens nothing, and then none; a scheduler of another class; all of it is saved."""
    _, graphs = exported("small")
    load = diffusion.OVStableDiffusionPipeline.from_pretrained
    pipeline = load(graphs, compile=False)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 1}
    sight = transformers.CLIPVisionConfig(**sizes, image_size=8, patch_size=4)
    config = transformers.CLIPConfig(vision_config=sight.to_dict(), projection_dim=32)
    checker = importlib.import_module("diffusers.pipelines.stable_diffusion").StableDiffusionSafetyChecker(config)
    pipeline.safety_checker = checker
    pipeline.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    assert pipeline.pipeline.safety_checker is checker and pipeline.safety_checker is checker
    pipeline.save_pretrained(tmp_path / "checked")
    index = json.loads((tmp_path / "checked" / "model_index.json").read_text())
    assert index["safety_checker"] == ["stable_diffusion", "StableDiffusionSafetyChecker"]
    assert index["scheduler"] == ["diffusers", "EulerDiscreteScheduler"]
    read = diffusion._load(tmp_path / "checked" / "safety_checker", *index["safety_checker"])
    assert type(read) is type(checker)
    pipeline.safety_checker = None
    assert pipeline.pipeline.safety_checker is None
    pipeline.save_pretrained(tmp_path / "free")
    free = load(tmp_path / "free", compile=False)
    assert free.safety_checker is None and type(free.scheduler) is diffusers.EulerDiscreteScheduler
    free.unet = pipeline.unet
    assert free.parts["unet"] is free.pipeline.unet is pipeline.parts["unet"]


@pytest.mark.slow
def test_a_pipeline_in_16_bits_stays_so_and_is_compared_part_by_part(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    original = small().to(torch.float16)
    original.save_pretrained(tmp_path / "torch")
    diffusion.export_pipeline(original, tmp_path / "graphs")
    assert {part.dtype for part in (original.unet, original.vae, original.text_encoder)} == {torch.float16}
    found = verify_pipeline(tmp_path / "graphs", tmp_path / "torch", {})
    assert found.passed and found.rounding is None
    parts = ("unet", "vae_encoder", "vae_decoder", "text_encoder")
    assert {(row.device, row.setting) for row in found.rows} == {
        (f"CPU, {part}", setting) for part in parts for setting in ("exact", "default")
    }
    other = small().to(torch.float16)
    other.unet.conv_out.weight.data *= -1
    other.save_pretrained(tmp_path / "other")
    wrong = verify_pipeline(tmp_path / "graphs", tmp_path / "other", {})
    assert [row.device for row in wrong.rows if row.setting == "exact" and not row.passed] == ["CPU, unet"]
    words = ["export", "openvino", "-m", str(tmp_path / "torch"), "--weight-format", "int8", str(tmp_path / "eight")]
    assert optimum_export.run(words) == 0
    said = capsys.readouterr().out
    assert "CPU, unet, default: as the source" in said and "the rounding itself moves answers" in said


@pytest.mark.slow
def test_large_parts_have_eight_bits_and_say_so(
    exported: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch_folder, _ = exported("small")
    unet = diffusers.UNet2DConditionModel.from_pretrained(torch_folder / "unet")
    monkeypatch.setattr(exporting, "LARGE", sum(weight.numel() for weight in unet.parameters()))
    load = diffusion.OVStableDiffusionPipeline.from_pretrained
    made = load(torch_folder, export=True, compile=False)
    assert [name for name, part in made.parts.items() if low_bit_weights(part.model)] == ["unet"]
    assert "unet has above 1e9 weights: 8 bits each; load_in_8bit=False keeps them" in capsys.readouterr().err


@pytest.mark.slow
def test_what_a_pipeline_cannot_do_is_a_sentence(exported: Any, tmp_path: Path) -> None:
    torch_folder, graphs = exported("small")
    load = diffusion.OVStableDiffusionPipeline.from_pretrained
    pipeline = load(graphs, compile=False)
    with pytest.raises(LowbitError, match="clip_skip reads inside of the text encoder"):
        pipeline("a cat", clip_skip=1)
    with pytest.raises(LowbitError, match="takes no cross_attention_kwargs: leave them out"):
        pipeline("a cat", cross_attention_kwargs={"scale": 0.5}, num_inference_steps=1)
    with pytest.raises(LowbitError, match=r"^the graph takes inputs of any size, so leave reshape out"):
        pipeline.reshape(batch_size=1, height=16, width=16)
    with pytest.raises(LowbitError, match=r"there is no device 'NPU' here: OpenVINO 2026\.4.* sees CPU"):
        pipeline.to("NPU")
    with pytest.raises(LowbitError, match=r"^to\(torch\.float16\): leave it out"):
        pipeline.to(torch.float16)
    with pytest.raises(CheckpointError, match=r"unet has no openvino_model\.xml"):
        load(torch_folder, export=False)
    with pytest.raises(RecipeError, match="AwqConfig quantises language models: take OVWeightQuantizationConfig here"):
        load(graphs, quantization_config=lowbit.AwqConfig())
    with pytest.raises(RecipeError, match="AwqConfig quantises language models: take OVWeightQuantizationConfig here"):
        load(torch_folder, export=True, quantization_config=lowbit.AwqConfig())
    words = {"bits": 4, "dataset": ["a cat"]}
    for where in ({"export": True}, {}):  # where it is looked at, and nothing has changed by then
        with pytest.raises(
            RecipeError, match=r"makes inputs of text alone, which this graph does not take \(it takes enc"
        ):
            load(torch_folder if where else graphs, quantization_config=words, **where)
    with pytest.raises(LowbitError, match=r"^config=: each part of a pipeline has its own in its folder"):
        load(graphs, config={})
    with pytest.raises(
        LowbitError, match=r"takes a folder or a name, not a StableDiffusionPipeline: .*export_pipeline"
    ):
        load(pipeline.pipeline)
    sentence = (
        r"holds a StableDiffusionPipeline, whose parts are not those of a StableDiffusionXLPipeline \(text_encoder_2\)"
    )
    with pytest.raises(CheckpointError, match=sentence):
        diffusion.OVStableDiffusionXLPipeline.from_pretrained(graphs)
    (tmp_path / "lost").mkdir()
    shutil.copytree(graphs, tmp_path / "lost", dirs_exist_ok=True)
    (tmp_path / "lost" / "model_index.json").unlink()
    with pytest.raises(CheckpointError, match=r"lost has no model_index\.json, so it is half a pipeline: export"):
        load(tmp_path / "lost")
    shutil.rmtree(tmp_path / "lost" / "vae_decoder")
    with pytest.raises(CheckpointError, match=r"lost has no vae_decoder/openvino_model\.xml, so it is half"):
        load(tmp_path / "lost")
    shutil.copytree(graphs, tmp_path / "lost", dirs_exist_ok=True)
    (tmp_path / "lost" / "unet" / "openvino_model.bin").unlink()
    with pytest.raises(CheckpointError, match=r"has openvino_model\.xml without its weights openvino_model\.bin"):
        load(tmp_path / "lost")


def test_without_diffusers_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "diffusers"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    for name in ("picture_graphs", "picture_export", "diffusion"):
        monkeypatch.delitem(sys.modules, f"lowbit.openvino.{name}")
    with pytest.raises(MissingPackageError, match=r"diffusers.*pip install 'lowbit\[diffusion\]'"):
        importlib.import_module("lowbit.openvino.diffusion")


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
    with pytest.raises(LowbitError, match=r"DDPMPipeline has no U-Net and no transformer that looks at text as lowbit"):
        diffusion.export_pipeline(diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler()), tmp_path, None)
