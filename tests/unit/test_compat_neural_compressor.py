"""The face of Neural Compressor: its classes, keywords that mean nothing any more, a model that is there already, refusals."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import lowbit
import lowbit.compat
from lowbit.compat.ignored import CompatWarning
from lowbit.errors import LowbitError, RecipeError
from unit.checkpoint_cases import EVEN, logits, make

pytestmark = pytest.mark.transformers
PLACE = "neural_compressor.transformers"


SHORT: dict[str, Any] = {"dataset": ["A page of a database holds rows. " * 20], "n_samples": 2, "seq_len": 16}
FIVE: dict[str, dict[str, Any]] = {
    "RtnConfig": {},
    "GPTQConfig": SHORT,
    "AwqConfig": SHORT,
    "TeqConfig": SHORT,
    "AutoRoundConfig": SHORT | {"iters": 4},
}


@pytest.fixture
def place() -> str:
    """What "xpu" means, if anything."""
    return ""


@pytest.fixture(autouse=True)
def old_names(place: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if place and torch.xpu.is_available():
        pytest.skip('"xpu" is an Intel GPU on this machine')
    if place:
        monkeypatch.setenv("LOWBIT_XPU", place)
    with lowbit.compat.install(children=False):
        yield


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("llama", tmp_path_factory.mktemp("face") / "dense", **EVEN)


def face(name: str = PLACE) -> Any:
    return importlib.import_module(name)


def test_classes_load(dense: Path, tmp_path: Path) -> None:
    config = face().RtnConfig(bits=4)
    model = face().AutoModelForCausalLM.from_pretrained(dense, quantization_config=config)
    direct = lowbit.AutoModelForCausalLM.from_pretrained(dense, quantization_config=lowbit.RtnConfig(bits=4))
    assert torch.equal(logits(model), logits(direct)) and model.quantization_config is config
    model.save_pretrained(tmp_path / "low")
    for load in (face().AutoModelForCausalLM.from_pretrained, face().AutoModelForCausalLM.load_low_bit):
        assert torch.equal(logits(load(tmp_path / "low")), logits(model))
    headless = face().AutoModel.from_pretrained(dense, quantization_config=face().RtnConfig())
    assert type(headless) is transformers.LlamaModel and headless.lowbit_report.layers
    sizes = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "vocab_size": 100}
    transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes)).save_pretrained(tmp_path / "t5")
    t5 = face().AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "t5", quantization_config=face().RtnConfig())
    assert {row.format for row in t5.lowbit_report.layers} == {"int4_g32"}


# TEQ trains for seconds.
@pytest.mark.parametrize("kind", [pytest.param(k, marks=pytest.mark.slow) if k == "TeqConfig" else k for k in FIVE])
@pytest.mark.parametrize("place", ["cpu"])
def test_on_xpu(kind: str, place: str, dense: Path, tmp_path: Path) -> None:
    """Quantised for an XPU, saved, and loaded onto it, as by default where there is one."""
    config = getattr(face(), kind)(**FIVE[kind])
    model = face().AutoModelForCausalLM.from_pretrained(dense, quantization_config=config, device_map="xpu")
    assert model.device.type == place and model.lowbit_report.formats()
    model.save_pretrained(tmp_path / "low")
    loaded = face().AutoModelForCausalLM.from_pretrained(tmp_path / "low").to("xpu")
    assert torch.equal(logits(loaded), logits(model)) and loaded.quantization_config.to_dict() == config.to_dict()
    ids = torch.tensor([[5, 6, 7]]).to("xpu")
    found = loaded.generate(ids, max_new_tokens=3, do_sample=False, temperature=0.9, num_beams=4)
    assert found.shape == (1, 6)


@pytest.mark.parametrize("place", ["cpu"])
def test_the_device_to_quantise_on(place: str, dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INC_TARGET_DEVICE", "xpu")
    model = face().AutoModelForCausalLM.from_pretrained(dense, quantization_config=face().RtnConfig())
    assert model.device.type == place
    monkeypatch.setenv("INC_TARGET_DEVICE", "CPU")
    model = face().AutoModelForCausalLM.from_pretrained(
        dense, quantization_config=face().RtnConfig(device="xpu"), device_map="xpu:0"
    )
    assert model.device.type == place


def test_the_configurations_are_ours() -> None:
    for place in (PLACE, f"{PLACE}.utils", f"{PLACE}.utils.quantization_config"):
        assert face(place).GPTQConfig is lowbit.GPTQConfig
    assert face(f"{PLACE}.utils.quantization_config").QuantizationMethod("rtn") == "rtn"
    assert face(f"{PLACE}.models.modeling_auto").AutoModel is face().AutoModel


def test_classes_for_pictures(tmp_path: Path) -> None:
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {**vision, "num_key_value_heads": 4, "vocab_size": 100}
    parts = {"vision_config": {**vision, "model_type": "clip_vision_model", "image_size": 8, "patch_size": 4}}
    config = transformers.LlavaConfig(**parts, text_config={**text, "model_type": "llama"}, image_token_index=99)
    transformers.LlavaForConditionalGeneration(config).save_pretrained(tmp_path / "llava")
    model = face().LlavaForConditionalGeneration.from_pretrained(
        tmp_path / "llava", quantization_config=face().RtnConfig()
    )
    assert type(model) is transformers.LlavaForConditionalGeneration and model.lowbit_report.layers
    assert face().Qwen2VLForConditionalGeneration.transformers_class is transformers.Qwen2VLForConditionalGeneration
    assert face().MllamaForConditionalGeneration.transformers_class is transformers.MllamaForConditionalGeneration


def test_keywords(dense: Path) -> None:
    silent = {"for_inference": False, "use_layer_wise": None, "use_llm_runtime": False, "_commit_hash": None}
    with warnings.catch_warnings():
        warnings.simplefilter("error", CompatWarning)
        model = face().AutoModelForCausalLM.from_pretrained(dense, quantization_config=face().RtnConfig(), **silent)
    with pytest.warns(CompatWarning, match="from_pretrained: use_llm_runtime has no effect: there is one engine"):
        face().AutoModelForCausalLM.from_pretrained(dense, load_in_4bit=True, use_llm_runtime=True, use_layer_wise=True)
    expected = logits(model)
    # What scripts do to a model that is quantised.
    assert torch.equal(logits(model.eval().to(memory_format=torch.channels_last)), expected)
    assert model.half().dtype == torch.float16 and model.lowbit_report.layers


def test_a_folder_that_is_low_bit_wins(dense: Path, tmp_path: Path) -> None:
    made = face().AutoModelForCausalLM.from_pretrained(dense, quantization_config=face().RtnConfig(bits=8))
    made.save_pretrained(tmp_path / "eight")
    with pytest.warns(UserWarning, match="low-bit already"):
        again = face().AutoModelForCausalLM.from_pretrained(
            tmp_path / "eight", quantization_config=face().GPTQConfig(bits=4)
        )
    assert torch.equal(logits(again), logits(made)) and again.quantization_config.bits == 8


@pytest.mark.parametrize("place", ["cpu"])
def test_ipex_takes_what_was_quantised_here(place: str, dense: Path, tmp_path: Path) -> None:
    ipex = importlib.import_module("intel_extension_for_pytorch")
    face().AutoModelForCausalLM.from_pretrained(dense, quantization_config=face().RtnConfig()).save_pretrained(
        tmp_path / "low"
    )
    model = face().AutoModelForCausalLM.from_pretrained(tmp_path / "low")
    config = model.quantization_config
    made = ipex.optimize_transformers(
        model, inplace=True, dtype=torch.float16, quantization_config=config, device="xpu"
    )
    assert made is model and made.dtype == torch.float16 and made.quantization_config is config
    found = made.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3, do_sample=False, num_beams=4)
    assert found.shape == (1, 6) and made.device.type == place


def test_a_model_that_is_there_already(dense: Path, tmp_path: Path) -> None:
    utils = face(f"{PLACE}.quantization.utils")
    assert (
        utils.convert_dtype_str2torch("fp16") is torch.float16
        and utils.convert_dtype_str2torch("auto") is torch.float32
    )
    assert utils.convert_dtype_torch2str(torch.bfloat16) == "bf16" and utils.convert_dtype_torch2str("fp32") == "fp32"
    for wrong in (lambda: utils.convert_dtype_str2torch("fp61"), lambda: utils.convert_dtype_torch2str(torch.int64)):
        with pytest.raises(RecipeError, match=r"fp16|has no name here"):
            wrong()
    config = face().GPTQConfig(dataset=["A page holds rows. " * 30], n_samples=2, seq_len=16)
    model = transformers.AutoModelForCausalLM.from_pretrained(dense)
    quantised = face(f"{PLACE}.quantization").convert_to_quantized_model(model, config, device="cpu")
    assert quantised is model and model.quantization_config is config
    assert {row.format for row in model.lowbit_report.layers} == {"int4_g32"}
    utils.save_low_bit(model, tmp_path / "low")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "low")
    assert torch.equal(logits(again), logits(model))
    with pytest.raises(AttributeError, match="use convert_to_quantized_model"):
        _ = utils.replace_linear


def test_loops_are_names_to_hand_on() -> None:
    loops = face(f"{PLACE}.generation")
    for loop, beams in ((loops._greedy_search, 1), (loops._beam_search, 4)):
        with pytest.raises(LowbitError, match=f"num_beams={beams}"):
            loop(None)


@pytest.mark.parametrize(
    ("statement", "said"),
    [
        (
            "import neural_compressor.torch.quantization",
            "lowbit has no neural_compressor.torch: use lowbit.optimize_model",
        ),
        ("from neural_compressor.evaluation.lm_eval import evaluate", "use `lowbit evaluate MODEL --text FILE`"),
        ("from neural_compressor.transformers import RtnConfg", "did you mean RtnConfig"),
        ("from neural_compressor.transformers import INCModelForCausalLM", "use AutoModelForCausalLM"),
        ("from neural_compressor import PostTrainingQuantConfig", "neural_compressor.transformers"),
        (
            "from neural_compressor.config import PostTrainingQuantConfig",
            r"use lowbit.optimize_model\(model, recipe=...\)",
        ),
    ],
)
def test_what_is_not_there_is_named(statement: str, said: str) -> None:
    with pytest.raises(ImportError, match=said):
        exec(statement)
