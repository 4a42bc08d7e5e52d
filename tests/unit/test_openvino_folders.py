"""Folders of OpenVINO's: which of two models in one is opened, what lies beside a graph, and what is refused in a sentence."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from lowbit.errors import CheckpointError, LowbitError, RecipeError
from lowbit.openvino import (
    OVModelForCausalLM,
    OVModelForMaskedLM,
    OVModelForSequenceClassification,
    OVWeightQuantizationConfig,
    compress_weights,
    write_decoder,
)
from lowbit.openvino.library import device
from lowbit.openvino.native import load as load_native
from lowbit.openvino.opening import EXACT
from lowbit_assets import tiny_model
from unit.checkpoint_cases import small_files

pytestmark = pytest.mark.transformers
TOKENS = torch.tensor([[1, 90, 91, 92, 93, 94]])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("llama", tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def model(tiny: Path) -> OVModelForCausalLM:
    return OVModelForCausalLM.from_pretrained(tiny, export=True, ov_config=EXACT)


def test_an_export_is_made_anew_from_shards(tiny: Path, tmp_path: Path) -> None:
    """The folder holds an older graph, and the weights of its original in several files."""
    original: Any = transformers.AutoModelForCausalLM.from_pretrained(tiny, dtype="float32")
    original.save_pretrained(tmp_path, max_shard_size="100KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    load = OVModelForCausalLM.from_pretrained
    load(tmp_path, export=True, compile=False).save_pretrained(tmp_path)
    original.lm_head.weight.data.mul_(2)
    original.save_pretrained(tmp_path, max_shard_size="100KB")
    with torch.no_grad():
        wanted = original(TOKENS).logits
    found = load(tmp_path, export=True, ov_config=EXACT)(TOKENS).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(load(tmp_path, ov_config=EXACT)(TOKENS).logits, wanted / 2, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("token", [99999, -1])
def test_a_token_beyond_the_vocabulary_is_named(model: OVModelForCausalLM, token: int) -> None:
    with pytest.raises(LowbitError, match=rf"^token {token} is none of the vocabulary, which has 0 to \d+: "):
        model.generate(torch.tensor([[1, token]]), max_new_tokens=2)


def test_devices_to_choose_among_are_looked_for() -> None:
    assert device("AUTO") == "AUTO" and device("auto:cpu") == "AUTO:CPU" and device("AUTO:CPU,-GPU") == "AUTO:CPU,-GPU"
    assert device("BATCH:CPU(4)") == "BATCH:CPU(4)"
    for name, absent in (("AUTO:NPU,CPU", "NPU"), ("HETERO:CPU,XPU", "XPU"), ("MULTI:GPU:7", r"GPU\.7")):
        with pytest.raises(LowbitError, match=rf"there is no device '{absent}', which '{name}' names, here: OpenVINO"):
            device(name)


def bert(folder: Path) -> Path:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    config = transformers.BertConfig(**sizes, vocab_size=96)
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    return folder


def said(folder: Path) -> dict[str, Any]:
    fields: dict[str, Any] = json.loads((folder / "openvino_config.json").read_text())["lowbit"]
    return fields


def test_what_lies_beside_a_graph_says_what_was_done_to_it(tiny: Path, tmp_path: Path) -> None:
    load = OVModelForCausalLM.from_pretrained
    model = load(tiny, export=True, compile=False)
    model.save_pretrained(tmp_path / "plain")
    assert said(tmp_path / "plain") == {"recipe": "as it was", "formats": {}}
    model.model = compress_weights(model.model, mode="int4_sym", group_size=32)
    model.save_pretrained(tmp_path / "small")
    again = said(tmp_path / "small")
    assert again["recipe"] != "as it was" and {"int4", "int8_asym_channel"} == {
        name.partition("_g")[0] for name in again["formats"]
    }
    load(tmp_path / "small", compile=False).save_pretrained(tmp_path / "copied")
    assert said(tmp_path / "copied") == again
    # In one go, and over what another export left there.
    config = {"bits": 4, "sym": True, "group_size": 32, "sensitivity_metric": "weight_quantization_error"}
    load(tiny, quantization_config=config, compile=False).save_pretrained(tmp_path / "plain")
    assert said(tmp_path / "plain") == again


def test_other_families_have_their_tokenizer_as_a_graph(tiny: Path, tmp_path: Path) -> None:
    folder = bert(tmp_path / "bert")
    for file in tiny.glob("tokenizer*"):
        shutil.copy(file, folder)
    load = OVModelForSequenceClassification.from_pretrained
    load(folder, export=True, compile=False).save_pretrained(tmp_path / "graph")
    names = {path.name for path in (tmp_path / "graph").iterdir()}
    assert {"openvino_tokenizer.xml", "openvino_tokenizer.bin", "openvino_detokenizer.xml", "tokenizer.json"} <= names
    load(folder, export=True, compile=False, convert_tokenizer=False).save_pretrained(tmp_path / "without")
    assert not (tmp_path / "without" / "openvino_tokenizer.xml").exists()


def test_without_openvino_tokenizers_the_rest_is_written(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A remark with the line that installs it; also where the package is of another release, which would end in a crash."""
    import openvino_tokenizers

    monkeypatch.setattr(openvino_tokenizers, "__version__", "2020.1.0.0")
    (note,) = write_decoder(tiny, tmp_path / "other").notes
    assert re.search(r"openvino-tokenizers 2020.1.0.0 does not belong .*: pip install 'lowbit\[openvino\]'", note)
    monkeypatch.setitem(sys.modules, "openvino_tokenizers", None)
    (note,) = write_decoder(tiny, tmp_path / "absent").notes
    assert re.search(
        r"no tokenizer .*'openvino-tokenizers', which is not installed: pip install 'lowbit\[openvino\]'$", note
    )
    for name in ("other", "absent"):
        assert not (tmp_path / name / "openvino_tokenizer.xml").exists()
        answer = load_native(tmp_path / name).generate("hello", max_new_tokens=3, ignore_end=True)
        assert len(answer.tokens) == 3


def test_a_graph_is_opened_by_the_class_of_its_head(tmp_path: Path) -> None:
    load = OVModelForSequenceClassification.from_pretrained
    load(bert(tmp_path / "bert"), export=True, compile=False).save_pretrained(tmp_path / "graph")
    sentence = "holds the graph of a BertForSequenceClassification: open it with OVModelForSequenceClassification$"
    with pytest.raises(CheckpointError, match=sentence):
        OVModelForMaskedLM.from_pretrained(tmp_path / "graph")
    # One made from weights without that head has it in its graph, and says so.
    OVModelForMaskedLM.from_pretrained(bert(tmp_path / "other"), export=True, compile=False).save_pretrained(
        tmp_path / "masked"
    )
    assert OVModelForMaskedLM.from_pretrained(tmp_path / "masked", compile=False).config.architectures == [
        "BertForMaskedLM"
    ]
    with pytest.warns(UserWarning, match="^task, use_io_binding: does nothing here and may be left out$"):
        again = load(tmp_path / "graph", task="text-classification", use_io_binding=True)
    assert again(input_ids=torch.tensor([[1, 2]])).logits.shape == (1, 2)
    # What the sentence about reshape says.
    fixed = load(tmp_path / "graph", compile=False)
    fixed.model.reshape({port.get_any_name(): [1, 2] for port in fixed.model.inputs})
    assert fixed(input_ids=torch.tensor([[1, 2]])).logits.shape == (1, 2)


def test_what_python_would_say_is_a_sentence(model: OVModelForCausalLM, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"file cannot be a folder \(File exists\): name another to write into$"):
        model.save_pretrained(tmp_path / "file")
    original: Any = transformers.AutoModelForCausalLM.from_pretrained(tiny)
    with pytest.raises(LowbitError, match=r"takes a folder or a name, not a LlamaForCausalLM: lowbit\.openvino\."):
        OVModelForCausalLM.from_pretrained(original)
    with pytest.raises(RecipeError, match=r"^quant_method='foo' is none: "):
        OVWeightQuantizationConfig(quant_method="foo")
    with pytest.raises(
        LowbitError, match=r"^the graph takes inputs of any size, so leave reshape out: .*model\.model\.reshape"
    ):
        model.reshape(1, 64)
    for bits in (4, 8):
        asked = transformers.BitsAndBytesConfig(**{f"load_in_{bits}bit": True})
        with pytest.raises(RecipeError, match=rf"^BitsAndBytesConfig is for .*: give load_in_{bits}bit=True instead$"):
            OVModelForCausalLM.from_pretrained(tiny, quantization_config=asked)


@pytest.mark.parametrize("limit", [1 << 10, 64 << 10])  # the graph ends there; its weights do, behind some of it
def test_a_folder_that_cannot_be_written_is_as_it_was(model: OVModelForCausalLM, tmp_path: Path, limit: int) -> None:
    model.save_pretrained(tmp_path / "there")
    (tmp_path / "there" / "mine.txt").write_text("stays")
    held = {file.name: file.read_bytes() for file in (tmp_path / "there").iterdir()}
    for name in ("there", "new"):
        with small_files(limit), pytest.raises(CheckpointError, match="could not"):
            model.save_pretrained(tmp_path / name)
    assert {file.name: file.read_bytes() for file in (tmp_path / "there").iterdir()} == held
    assert not (tmp_path / "new").exists()
    model.save_pretrained(tmp_path / "there")
    assert {file.name: file.read_bytes() for file in (tmp_path / "there").iterdir()} == held
