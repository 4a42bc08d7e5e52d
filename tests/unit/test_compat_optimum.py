"""optimum.intel, optimum.exporters.openvino, nncf and optimum-cli, answered."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import lowbit.compat
import lowbit.openvino
from lowbit.compat import optimum_export
from lowbit.compat.aliases import face_of
from lowbit.errors import LowbitError
from lowbit.openvino.library import core
from lowbit_assets import tiny_model

pytestmark = pytest.mark.transformers
CLASSES = (
    "OVConfig", "OVDiffusionPipeline", "OVFluxImg2ImgPipeline", "OVFluxInpaintPipeline", "OVFluxPipeline",
    "OVLatentConsistencyModelPipeline", "OVModelForAudioClassification", "OVModelForCTC", "OVModelForCausalLM",
    "OVModelForFeatureExtraction", "OVModelForImageClassification", "OVModelForMaskedLM",
    "OVModelForQuestionAnswering", "OVModelForSeq2SeqLM", "OVModelForSequenceClassification",
    "OVModelForSpeechSeq2Seq", "OVModelForTokenClassification", "OVPipelineForImage2Image", "OVPipelineForInpainting",
    "OVPipelineForText2Image", "OVQuantizationMethod", "OVStableDiffusion3Img2ImgPipeline",
    "OVStableDiffusion3Pipeline", "OVStableDiffusionImg2ImgPipeline", "OVStableDiffusionInpaintPipeline",
    "OVStableDiffusionPipeline", "OVStableDiffusionXLImg2ImgPipeline", "OVStableDiffusionXLInpaintPipeline",
    "OVStableDiffusionXLPipeline", "OVWeightQuantizationConfig",
)  # fmt: skip
COMPRESSION = (
    "AdvancedCompressionParameters", "BackupMode", "CompressWeightsMode", "Dataset", "IgnoredScope", "SensitivityMetric",
)  # fmt: skip
ABSENT = (
    "OVQuantizer", "OVQuantizationConfig", "OVMixedQuantizationConfig", "OVPipelineQuantizationConfig", "OVTrainer",
    "IPEXModelForCausalLM", "INCModelForCausalLM", "IPEXModelForMaskedLM", "INCModelForMaskedLM", "IPEXModel", "INCQuantizer",
    "IPEXModelForQuestionAnswering", "INCModelForQuestionAnswering", "IPEXModelForSeq2SeqLM", "INCModelForSeq2SeqLM", "ipex",
    "IPEXModelForSequenceClassification", "INCModelForSequenceClassification", "IPEXModelForTokenClassification",
    "INCModelForTokenClassification", "neural_compressor",
)  # fmt: skip
UNCOMPRESSED = (
    "quantize", "quantize_with_accuracy_control", "QuantizationPreset", "TargetDevice", "NNCFConfig", "strip", "torch",
)  # fmt: skip


@pytest.fixture(autouse=True)
def old_world() -> Iterator[None]:
    with lowbit.compat.install(children=False):
        yield


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("llama", tmp_path_factory.mktemp("tiny") / "model")


def kinds(folder: Path) -> set[str]:
    graph = core().read_model(folder / "openvino_model.xml")
    return {n.get_element_type().get_type_name() for n in graph.get_ordered_ops() if n.get_type_name() == "Constant"}


def test_classes_are_ours() -> None:
    intel, deeper, nncf = (
        importlib.import_module(name) for name in ("optimum.intel", "optimum.intel.openvino", "nncf")
    )
    for name in CLASSES:
        assert getattr(intel, name) is getattr(deeper, name) is getattr(lowbit.openvino, name)
    for name in (*COMPRESSION, "compress_weights"):
        assert getattr(nncf, name) is getattr(lowbit.openvino, name)
    assert importlib.import_module("nncf.parameters").CompressWeightsMode is lowbit.openvino.CompressWeightsMode
    assert nncf.CompressWeightsMode.INT4_SYM.value == "int4_sym"


def test_what_is_not_there_is_named() -> None:
    for home, names in (
        ("optimum.intel", ABSENT),
        ("nncf", UNCOMPRESSED),
        ("optimum.exporters.openvino", ["export_from_model"]),
    ):
        for name in names:
            with pytest.raises(LowbitError, match=rf"^lowbit has no {home}\.{name}: use "):
                getattr(importlib.import_module(home), name)
    with pytest.raises(ImportError, match=r"^lowbit has no optimum\.onnxruntime: use an optimum of your own"):
        importlib.import_module("optimum.onnxruntime")


def test_another_task_goes_through_its_class(tmp_path: Path) -> None:
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "vocab_size": 64,
    }
    transformers.BertForSequenceClassification(transformers.BertConfig(**sizes)).save_pretrained(tmp_path / "bert")
    assert (
        optimum_export.run(["export", "openvino", "-m", str(tmp_path / "bert"), "--int8", str(tmp_path / "out")]) == 0
    )
    assert "u8" in kinds(tmp_path / "out")
    model = lowbit.openvino.OVModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert model(input_ids=torch.tensor([[1, 2, 3]]), attention_mask=torch.ones(1, 3).long()).logits.shape == (1, 2)


def test_an_optimum_that_is_there_stays(tmp_path: Path) -> None:
    (tmp_path / "optimum" / "onnxruntime").mkdir(parents=True)
    (tmp_path / "optimum" / "onnxruntime" / "__init__.py").write_text("class ORTModel: pass")
    (tmp_path / "optimum" / "__init__.py").write_text("mine = True")
    (tmp_path / "script.py").write_text(
        "from optimum.onnxruntime import ORTModel\nfrom optimum.intel import OVConfig\nimport optimum\n"
        "print(ORTModel.__module__, OVConfig.__module__, optimum.mine)\n"
    )
    command = [sys.executable, "-m", "lowbit.compat", "script.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["optimum.onnxruntime", "lowbit.openvino.configs", "True"], done.stderr
    assert face_of("optimum.intel.x") == "lowbit.compat.faces.optimum.intel.x"


def test_keywords(tiny: Path) -> None:
    intel = importlib.import_module("optimum.intel")
    load = intel.OVModelForCausalLM.from_pretrained
    four = load(tiny, export=True, load_in_4bit=True, compile=False)
    config = intel.OVWeightQuantizationConfig(bits=4, sym=True, group_size=32, ratio=0.8)
    mixed = load(tiny, export=True, quantization_config=config, compile=True, ov_config={"PERFORMANCE_HINT": "LATENCY"})
    for model, kind in ((four, "u4"), (mixed, "i4")):
        found = {
            node.get_element_type().get_type_name() for node in model.model.get_ordered_ops() if "Constant" in str(node)
        }
        assert kind in found and "f32" in found
    assert mixed.generate(torch.tensor([[1, 50]]), max_new_tokens=3, do_sample=False).shape == (1, 5)


def test_main_export(tiny: Path, tmp_path: Path) -> None:
    intel, exporters = (importlib.import_module(name) for name in ("optimum.intel", "optimum.exporters.openvino"))
    config = intel.OVConfig(quantization_config=intel.OVWeightQuantizationConfig(bits=8))
    exporters.main_export(tiny, tmp_path / "out", task="text-generation-with-past", ov_config=config)
    assert "u8" in kinds(tmp_path / "out") and (tmp_path / "out" / "openvino_tokenizer.xml").is_file()
    with pytest.raises(LowbitError, match="stateful=False"):
        exporters.main_export(tiny, tmp_path / "other", stateful=False)
    with pytest.raises(LowbitError, match="none of lowbit's: did you mean text-generation"):
        exporters.main_export(tiny, tmp_path / "other", task="text-generating")


@pytest.mark.slow
def test_optimum_cli(tiny: Path, tmp_path: Path) -> None:
    """The guide's own command, with the option that the program does not take any more."""
    line = ["optimum-cli", "export", "openvino", "--model", str(tiny), "out", "--int8"]
    done = subprocess.run(
        [sys.executable, "-m", "lowbit.compat", *line], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and "out: the model in OpenVINO's form" in done.stdout, done.stderr
    assert "CPU, exact: as the source" in done.stdout
    assert "u8" in kinds(tmp_path / "out")


@pytest.mark.filterwarnings("ignore:the data set wikitext2 lies on the hub:UserWarning")
@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ("", "f32"),
        ("--weight-format fp32 --task text-generation", "f32"),
        ("--weight-format int4 --sym --group-size 32 --ratio 0.8", "i4"),
        pytest.param("--int4 --group-size 32 --gptq --dataset wikitext2 --num-samples 4", "u4", marks=pytest.mark.slow),
        ("--weight-format nf4 --group-size 32 --disable-convert-tokenizer", "nf4"),
        ("--int4 --group-size 32 --all-layers --backup-precision int8_sym", "u4"),
        ("--weight-format cb4 --group-size 32", "u4"),
    ],
)
def test_choices_of_optimum_cli(tiny: Path, tmp_path: Path, options: str, kind: str) -> None:
    words = ["export", "openvino", "-m", str(tiny), "--no-verify", *options.split(), str(tmp_path / "out")]
    assert optimum_export.run(words) == 0
    assert kind in kinds(tmp_path / "out")
    assert (tmp_path / "out" / "openvino_tokenizer.xml").is_file() != ("--disable-convert-tokenizer" in words)
    for refused, said in (
        ("--quant-mode int8", "plugins themselves"), ("--ratio 0.5", "add --weight-format int4"), ("--awq", "add --weight-format"),
        ("--weight-format cb4 --awq", "take dtype='nf4'"), ("--disable-stateful", "past inside"),
        ("--pad-token-id 0", "set it in the model's config.json"), ("--int8 --awq", "is for 4 bits"),
    ):  # fmt: skip
        with pytest.raises(LowbitError, match=said):
            optimum_export.run(["export", "openvino", "-m", str(tiny), *refused.split(), str(tmp_path / "refused")])
    with pytest.raises(LowbitError, match="answers one: optimum-cli export openvino"):
        optimum_export.run(["export", "onnx"])


def weights(folder: Path) -> set[str]:
    """The types of all constants of some size."""
    graph = core().read_model(folder / "openvino_model.xml")
    constants = [node for node in graph.get_ordered_ops() if node.get_type_name() == "Constant"]
    return {n.get_element_type().get_type_name() for n in constants if n.get_output_size() and n.data.size >= 1024}


def test_weights_that_are_not_rounded_have_the_type_that_is_asked_for(tiny: Path, tmp_path: Path) -> None:
    run = lambda *words: optimum_export.run(["export", "openvino", "--no-verify", *map(str, words)])  # noqa: E731
    for words, kind in (
        (("--weight-format", "fp32"), "f32"),
        (("--weight-format", "fp16"), "f16"),
        (("--fp16",), "f16"),
    ):
        assert run("-m", tiny, *words, tmp_path / "out") == 0
        assert weights(tmp_path / "out") == {kind}
    config = lowbit.openvino.OVConfig(dtype="fp16")
    optimum_export.main_export(tiny, tmp_path / "called", ov_config=config)
    assert weights(tmp_path / "called") == {"f16"}
    with pytest.raises(LowbitError, match=r"^dtype='int5' is the type of weights that are not rounded"):
        optimum_export.main_export(tiny, tmp_path / "other", ov_config=lowbit.openvino.OVConfig(dtype="int5"))
    # One that is followed in torch, and one of another task.
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "vocab_size": 64,
    }
    transformers.BertForMaskedLM(transformers.BertConfig(**sizes)).save_pretrained(tmp_path / "bert")
    config = transformers.BioGptConfig(**sizes, pad_token_id=0)
    transformers.BioGptForCausalLM(config).save_pretrained(tmp_path / "biogpt")
    for name in ("bert", "biogpt"):
        assert run("-m", tmp_path / name, "--fp16", tmp_path / f"{name}_out") == 0
        assert weights(tmp_path / f"{name}_out") == {"f16"}


def test_two_formats_at_once_are_refused(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in ("--int8 --int4", "--weight-format int4 --fp16"):
        with pytest.raises(SystemExit):
            optimum_export.run(["export", "openvino", "-m", str(tiny), *words.split(), str(tmp_path / "out")])
        assert "not allowed with argument" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "OVModelForCausalLM"),
        ({"architectures": ["GPT2LMHeadModel"]}, "OVModelForCausalLM"),
        ({"architectures": ["WhisperForConditionalGeneration"]}, "OVModelForSpeechSeq2Seq"),
        ({"architectures": ["T5ForConditionalGeneration"]}, "OVModelForSeq2SeqLM"),
        ({"architectures": ["BertModel"]}, "OVModelForFeatureExtraction"),
        ({"architectures": ["BertForMaskedLM"]}, "OVModelForMaskedLM"),
        ({"architectures": ["ViTForImageClassification"]}, "OVModelForImageClassification"),
        ({}, None),
    ],
)
def test_the_task_is_the_models_own(tmp_path: Path, fields: dict[str, Any], name: str | None) -> None:
    import json

    (tmp_path / "config.json").write_text(json.dumps({"model_type": "any", **fields}))
    if name is None:
        with pytest.raises(LowbitError, match="add --task, one of text-generation"):
            optimum_export.class_of(tmp_path, "auto", {})
    else:
        assert optimum_export.class_of(tmp_path, "auto", {}) == name
