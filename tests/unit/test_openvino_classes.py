"""The classes of one graph: they give what transformers' own modules give, in the same output classes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import modeling_outputs

import lowbit
from cpu.test_openvino_export import written_codes
from lowbit import openvino
from lowbit.bridge.weights import held_weights
from lowbit.errors import CheckpointError, LowbitError, RecipeError
from lowbit.openvino import compress_weights, compression_report, traced
from lowbit.openvino.constants import hold
from lowbit.openvino.examples import example_of
from lowbit.openvino.opening import EXACT
from lowbit.openvino.sites import low_bit_weights

# Following a module takes torch seconds.
pytestmark = pytest.mark.slow

BERT = {
    "vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128,
    "max_position_embeddings": 40,
}  # fmt: skip
WAVE = {
    "vocab_size": 32, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 128,
    "conv_dim": (32, 32), "conv_stride": (5, 4), "conv_kernel": (10, 8), "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4,
}  # fmt: skip
CLOSE = 2e-6


def bert(head: str = "Model") -> Any:
    return getattr(transformers, f"Bert{head}")(transformers.BertConfig(**BERT))


def roberta() -> Any:
    return transformers.RobertaModel(transformers.RobertaConfig(**BERT))


def vit() -> Any:
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 128}
    return transformers.ViTForImageClassification(transformers.ViTConfig(**sizes, image_size=32, patch_size=8))


def resnet() -> Any:
    sizes = {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1]}
    return transformers.ResNetForImageClassification(transformers.ResNetConfig(**sizes))


def qwen3() -> Any:
    return transformers.Qwen3Model(transformers.Qwen3Config(**BERT, num_key_value_heads=2, head_dim=16))


def wave(head: str) -> Any:
    return getattr(transformers, f"Wav2Vec2For{head}")(transformers.Wav2Vec2Config(**WAVE))


def held_codes(module: Any) -> dict[str, bytes]:
    """The codes of a module's packed weights, as OpenVINO is to have them."""
    return {name: hold(held.packed()).codes.array.tobytes() for name, held in held_weights(module).items()}


# Class, what makes a module for it, the class of what it gives.
TASKS: dict[str, tuple[str, Callable[[], Any], Any]] = {
    "bert": ("FeatureExtraction", bert, modeling_outputs.BaseModelOutputWithPooling),
    "qwen3": ("FeatureExtraction", qwen3, modeling_outputs.BaseModelOutput),
    "roberta": ("FeatureExtraction", roberta, modeling_outputs.BaseModelOutputWithPooling),
    "masks": ("MaskedLM", lambda: bert("ForMaskedLM"), modeling_outputs.MaskedLMOutput),
    "texts": (
        "SequenceClassification",
        lambda: bert("ForSequenceClassification"),
        modeling_outputs.SequenceClassifierOutput,
    ),
    "tokens": ("TokenClassification", lambda: bert("ForTokenClassification"), modeling_outputs.TokenClassifierOutput),
    "answers": (
        "QuestionAnswering",
        lambda: bert("ForQuestionAnswering"),
        modeling_outputs.QuestionAnsweringModelOutput,
    ),
    "vit": ("ImageClassification", vit, modeling_outputs.ImageClassifierOutputWithNoAttention),
    "resnet": ("ImageClassification", resnet, modeling_outputs.ImageClassifierOutputWithNoAttention),
    "sounds": (
        "AudioClassification",
        lambda: wave("SequenceClassification"),
        modeling_outputs.SequenceClassifierOutput,
    ),
    "letters": ("CTC", lambda: wave("CTC"), modeling_outputs.CausalLMOutput),
}
QUICK = ("bert", "vit")


def saved(make: Callable[[], Any], folder: Path) -> Any:
    torch.manual_seed(0)
    make().save_pretrained(folder)
    # As it is read: what is not saved is made anew.
    return folder


def inputs(model: Any, rows: int = 2, length: int = 12) -> dict[str, torch.Tensor]:
    torch.manual_seed(rows)
    found = example_of(model, rows, length)
    if "attention_mask" in found:
        found["attention_mask"][-1, length // 2 :] = 0
    return found


@pytest.mark.parametrize(
    "task", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in TASKS]
)
def test_every_class_gives_what_transformers_gives(task: str, tmp_path: Path) -> None:
    name, make, kind = TASKS[task]
    ours = getattr(openvino, f"OVModelFor{name}")
    folder = saved(make, tmp_path / "torch")
    original = ours.auto_model_class.from_pretrained(folder).eval()
    model = ours.from_pretrained(folder, export=True, ov_config=EXACT)
    given = inputs(original)
    with torch.no_grad():
        expected = original(**given)
    found = model(**given)
    assert type(found) is kind
    for key, value in found.items():
        torch.testing.assert_close(
            value, expected[key], rtol=0, atol=CLOSE * max(1.0, float(expected[key].abs().max()))
        )
    if "attention_mask" in given:
        padded = given | {"attention_mask": given["attention_mask"].flip(1)}  # on the left, and no places are named
        with torch.no_grad():
            expected_left = original(**padded)[0]
        seen = padded["attention_mask"].bool() if expected_left.dim() == 3 else slice(None)
        torch.testing.assert_close(model(**padded)[0][seen], expected_left[seen], rtol=0, atol=10 * CLOSE)
    model.save_pretrained(tmp_path / "graph")
    again = ours.from_pretrained(tmp_path / "graph", ov_config=EXACT)
    assert torch.equal(again(**given)[0], found[0])
    assert again.config.to_dict()["architectures"] == original.config.architectures


@pytest.mark.slow
def test_bits_are_those_that_were_asked_for(tmp_path: Path) -> None:
    folder = saved(bert, tmp_path / "torch")
    read = openvino.OVModelForFeatureExtraction.from_pretrained
    eight = read(folder, export=True, load_in_8bit=True, compile=False)
    assert compression_report(eight.model).formats() == {"int8_asym_channel": 16}
    four = read(folder, export=True, load_in_4bit=True, compile=False)
    assert compression_report(four.model).formats() == {"int4_asym": 10, "int4_asym_g128": 2, "int8_asym_channel": 4}
    asked = {"bits": 4, "sym": True, "group_size": 32, "ratio": 0.5}
    half = compression_report(read(folder, export=True, quantization_config=asked, compile=False).model).formats()
    assert half["int4_g32"] < 12 and half["int8_asym_channel"] > 4
    assert not low_bit_weights(read(folder, export=True, load_in_8bit=False, compile=False).model)
    eight.save_pretrained(tmp_path / "eight")
    with pytest.raises(RecipeError, match="low-bit already"):
        read(tmp_path / "eight", load_in_4bit=True)
    with pytest.raises(RecipeError, match="ask for two things"):
        read(folder, load_in_8bit=True, load_in_4bit=True)


@pytest.mark.slow
def test_large_models_have_eight_bits_and_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = saved(bert, tmp_path)
    monkeypatch.setattr(traced, "LARGE", 1000)
    read = openvino.OVModelForFeatureExtraction.from_pretrained
    assert len(low_bit_weights(read(folder, export=True, compile=False).model)) == 16
    assert "load_in_8bit=False keeps their type" in capsys.readouterr().err
    assert not low_bit_weights(read(folder, export=True, load_in_8bit=False, compile=False).model)


def test_a_low_bit_folder_keeps_its_codes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = bert().eval()
    lowbit.optimize_model(module, "int4_g32")
    module.save_low_bit(tmp_path / "low")
    model = openvino.OVModelForFeatureExtraction.from_pretrained(tmp_path / "low", export=True, ov_config=EXACT)
    names = low_bit_weights(model.model)
    assert len(names) == 13 and "encoder.layer.1.output.dense.weight" in names
    assert written_codes(model.model, names) == held_codes(module)
    given = inputs(module)
    with torch.no_grad():
        expected = module(**given).last_hidden_state
    torch.testing.assert_close(model(**given).last_hidden_state, expected, rtol=0, atol=0.02)


@pytest.mark.slow
def test_gptq_of_ours_rounds_before_the_export(tmp_path: Path) -> None:
    folder = saved(bert, tmp_path)
    config = lowbit.GPTQConfig(bits=4, group_size=32, dataset=torch.randint(3, 96, (4, 16)))
    model = openvino.OVModelForFeatureExtraction.from_pretrained(folder, export=True, quantization_config=config)
    expected = held_codes(lowbit.AutoModel.from_pretrained(folder, quantization_config=config))
    assert "encoder.layer.0.attention.self.query.weight" in expected
    assert written_codes(model.model, low_bit_weights(model.model)) == expected


@pytest.mark.slow
def test_the_graph_can_be_exchanged_as_the_guide_does(tmp_path: Path) -> None:
    model = openvino.OVModelForFeatureExtraction.from_pretrained(saved(bert, tmp_path), export=True, ov_config=EXACT)
    given = inputs(bert())
    before = model(**given).last_hidden_state
    model.model = compress_weights(model.model, mode="int4_sym", group_size=32, ratio=0.8)
    after = model(**given).last_hidden_state
    assert 1e-4 < float((after - before).norm() / before.norm()) < 0.05


@pytest.mark.slow
def test_halves_stay_halves(tmp_path: Path) -> None:
    torch.manual_seed(0)
    bert().save_pretrained(tmp_path / "single")
    bert().half().save_pretrained(tmp_path / "half")
    sizes = []
    for name in ("single", "half"):
        model = openvino.OVModelForFeatureExtraction
        out = tmp_path / f"{name}-graph"
        out.mkdir()
        model.export(tmp_path / name, out, dtype="auto")
        sizes.append((out / "openvino_model.bin").stat().st_size)
    assert 1.8 < sizes[0] / sizes[1] < 2.1


def test_what_a_call_leaves_out_is_made(tmp_path: Path) -> None:
    model = openvino.OVModelForFeatureExtraction.from_pretrained(saved(bert, tmp_path), export=True, ov_config=EXACT)
    ids = torch.randint(3, 96, (2, 5))
    whole = model(input_ids=ids, attention_mask=torch.ones_like(ids), token_type_ids=torch.zeros_like(ids))
    np.testing.assert_array_equal(model(ids)[0], whole[0])
    assert isinstance(model(ids, return_dict=False), tuple)
    with pytest.raises(LowbitError, match=r"pixel_values is no input of the graph, which takes input_ids"):
        model(ids, pixel_values=torch.rand(1))
    with pytest.raises(LowbitError, match="the graph needs input_ids"):
        model(attention_mask=torch.ones(1, 3))
    with pytest.raises(LowbitError, match="gives no loss: call it without labels"):
        model(ids, labels=ids)
    with pytest.raises(LowbitError, match=r"there is no device 'NPU' here: OpenVINO 2026\.4.* sees CPU"):
        model.to("NPU")


def test_what_is_given_is_looked_at(tmp_path: Path) -> None:
    folder = saved(bert, tmp_path / "torch")
    load = openvino.OVModelForFeatureExtraction.from_pretrained
    model = load(folder, export=True, ov_config=EXACT)
    with pytest.raises(LowbitError, match=r"^token 9999 is none of the vocabulary, which has 0 to 95: "):
        model(torch.tensor([[1, 9999]]))
    with pytest.raises(LowbitError, match=r"^input_ids is a tensor of numbers, not a str$"):
        model("hello")
    with pytest.raises(LowbitError, match=r"^4 inputs are given, and the graph takes input_ids, attention_mask, "):
        model(*[torch.ones(1, 2, dtype=torch.long)] * 4)
    # A module in memory that is being trained, whose dropout is on.
    module = transformers.BertModel.from_pretrained(folder).train()
    openvino.OVModelForFeatureExtraction.export(module, tmp_path / "graph")
    ids = torch.tensor([[5, 6, 7]])
    assert module.training and torch.equal(load(tmp_path / "graph", ov_config=EXACT)(ids)[0], model(ids)[0])


def test_what_is_no_model_of_the_class_is_a_sentence(tmp_path: Path) -> None:
    saved(bert, tmp_path / "bert")
    said = r"bert cannot be opened by AutoModelForCTC \(Unrecognized configuration class .*BertConfig"
    with pytest.raises(CheckpointError, match=said) as caught:
        openvino.OVModelForCTC.from_pretrained(tmp_path / "bert")
    assert "\n" not in str(caught.value) and "Model type should be one of" not in str(caught.value)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"empty cannot be opened by AutoModel \(Unrecognized model in "):
        openvino.OVModelForFeatureExtraction.from_pretrained(tmp_path / "empty")


def test_awq_of_an_encoder_is_written_as_it_is(tmp_path: Path) -> None:
    config = {"bits": 4, "group_size": 32, "quant_method": "awq", "dataset": torch.randint(3, 96, (4, 16))}
    model = openvino.OVModelForFeatureExtraction.from_pretrained(
        saved(bert, tmp_path), export=True, quantization_config=config, compile=False
    )
    assert "encoder.layer.0.attention.self.query.weight" in low_bit_weights(model.model)


def test_folders_that_lack_something_say_what(tmp_path: Path) -> None:
    read = openvino.OVModelForFeatureExtraction.from_pretrained
    folder = saved(bert, tmp_path / "torch")
    with pytest.raises(CheckpointError, match=r"has no openvino_model\.xml"):
        read(folder, export=False)
    read(folder, export=True, compile=False).save_pretrained(tmp_path / "graph")
    (tmp_path / "graph" / "openvino_model.bin").unlink()
    with pytest.raises(CheckpointError, match=r"without its weights openvino_model\.bin: copy that file"):
        read(tmp_path / "graph")


def test_a_module_that_decides_by_sizes_is_refused() -> None:
    class Fixed(transformers.BertModel):
        def forward(self, input_ids: Any = None, attention_mask: Any = None, **named: Any) -> Any:
            found = super().forward(input_ids, attention_mask, **named)
            found.last_hidden_state = found.last_hidden_state * int(input_ids.shape[1])
            return found

    with pytest.raises(LowbitError, match="decides by the sizes of its inputs, so that its trace is not the model"):
        traced.trace_model(Fixed(transformers.BertConfig(**BERT)).eval())
