"""transformers' pipelines take graphs for models of their tasks, say nothing about it, and answer as with torch's models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

from lowbit import openvino
from lowbit.openvino import OVModelForCausalLM
from lowbit.openvino.opening import EXACT
from lowbit_assets import tiny_model
from unit.test_openvino_classes import bert, saved, vit, wave

pytestmark = pytest.mark.transformers
RATE = 16000


def words() -> dict[str, Any]:
    vocabulary = {word: place for place, word in enumerate(["[PAD]", "[MASK]", "[UNK]", "a", "cat", "sat", "here"])}
    held = Tokenizer(models.WordLevel(vocabulary, "[UNK]"))
    held.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "[PAD]", "mask_token": "[MASK]", "unk_token": "[UNK]"}
    return {"tokenizer": transformers.PreTrainedTokenizerFast(tokenizer_object=held, **special)}


def pixels() -> dict[str, Any]:
    return {"image_processor": transformers.ViTImageProcessor(size={"height": 32, "width": 32})}


def sounds() -> dict[str, Any]:
    return {"feature_extractor": transformers.Wav2Vec2FeatureExtractor(sampling_rate=RATE)}


def letters(folder: Path) -> dict[str, Any]:
    vocabulary = ["<pad>", "<s>", "</s>", "<unk>", "|", *"abcdefghijklmnopqrstuvwxyz'"]
    (folder / "vocab.json").write_text("{" + ",".join(f'"{word}":{i}' for i, word in enumerate(vocabulary)) + "}")
    return {"tokenizer": transformers.Wav2Vec2CTCTokenizer(str(folder / "vocab.json")), **sounds()}


def picture() -> Any:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8))


def sound() -> Any:
    return np.random.default_rng(0).standard_normal(RATE // 2).astype(np.float32)


# Task: the class of ours, a small model of it, what turns inputs into tensors, an input.
TASKS: dict[str, tuple[str, Callable[[], Any], Callable[..., Any], Callable[[], Any]]] = {
    "text-classification": (
        "SequenceClassification",
        lambda: bert("ForSequenceClassification"),
        words,
        lambda: "a cat",
    ),
    "token-classification": ("TokenClassification", lambda: bert("ForTokenClassification"), words, lambda: "a cat sat"),
    "fill-mask": ("MaskedLM", lambda: bert("ForMaskedLM"), words, lambda: "a [MASK] sat"),
    "feature-extraction": ("FeatureExtraction", bert, words, lambda: "a cat sat"),
    "image-classification": ("ImageClassification", vit, pixels, picture),
    "audio-classification": ("AudioClassification", lambda: wave("SequenceClassification"), sounds, sound),
    "automatic-speech-recognition": ("CTC", lambda: wave("CTC"), letters, sound),
}


def leaves(answer: Any) -> list[Any]:
    """Words and numbers of an answer in their order."""
    if isinstance(answer, dict):
        return [leaf for key in sorted(answer) for leaf in (key, *leaves(answer[key]))]
    if isinstance(answer, list | tuple):
        return [leaf for part in answer for leaf in leaves(part)]
    return [answer]


def are_alike(found: Any, expected: Any) -> None:
    assert len(leaves(found)) == len(leaves(expected)) > 0
    for mine, other in zip(leaves(found), leaves(expected), strict=True):
        assert mine == (other if isinstance(other, str) else pytest.approx(other, abs=1e-4))


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_a_pipeline_of_transformers(task: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    name, make, reads, given = TASKS[task]
    ours = getattr(openvino, f"OVModelFor{name}")
    folder = saved(make, tmp_path)
    model = ours.from_pretrained(folder, export=True, ov_config=EXACT)
    original = ours.auto_model_class.from_pretrained(folder).eval()
    around = reads(tmp_path) if reads is letters else reads()
    found = transformers.pipeline(task, model=model, **around)(given())
    assert "not supported" not in caplog.text
    are_alike(found, transformers.pipeline(task, model=original, device="cpu", **around)(given()))


def test_text_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tiny = tiny_model("llama", tmp_path / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny)
    original = transformers.AutoModelForCausalLM.from_pretrained(tiny, dtype="float32")
    model = OVModelForCausalLM.from_pretrained(tiny, export=True, ov_config=EXACT)
    texts = []
    for each in (model, original):
        write = transformers.pipeline("text-generation", model=each, tokenizer=tokenizer)
        texts.append(write(["hello", "a"], max_new_tokens=8, do_sample=False, batch_size=2))
    assert "not supported" not in caplog.text
    assert texts[0] == texts[1]


def test_what_is_said_of_a_model_of_another_task_stays(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tiny = tiny_model("llama", tmp_path / "model")
    model = OVModelForCausalLM.from_pretrained(tiny, export=True)
    transformers.pipeline("text-classification", model=model, tokenizer=words()["tokenizer"])
    assert "'OVModelForCausalLM' is not supported for text-classification" in caplog.text


def test_configurations_of_a_kind_are_no_graphs() -> None:
    """The classes stand beside transformers' own, and in nobody's way."""
    config = transformers.LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    with torch.device("meta"):
        made = transformers.AutoModelForCausalLM.from_config(config)
    assert type(made) is transformers.LlamaForCausalLM
