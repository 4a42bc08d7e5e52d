"""Every wish of a configuration in optimum-intel's words changes what is written, or is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from lowbit.cli import main
from lowbit.compat import optimum_export
from lowbit.errors import CheckpointError, RecipeError
from lowbit.openvino import (
    OVModelForCausalLM,
    OVWeightQuantizationConfig,
    compress_weights,
    compression_report,
    write_decoder,
)
from lowbit.openvino.opening import EXACT
from lowbit.openvino.sites import find_sites
from lowbit_assets import tiny_model

pytestmark = [
    pytest.mark.transformers,
    pytest.mark.filterwarnings("ignore:.*windows:UserWarning"),
]
TEXTS = ["the quick brown fox jumps over the lazy dog " * 3] * 40
AWQ = {"bits": 4, "group_size": 32, "quant_method": "awq", "dataset": TEXTS, "num_samples": 2}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("llama", tmp_path_factory.mktemp("tiny") / "model")


def large_constants(model: OVModelForCausalLM) -> dict[str, bytes]:
    """The bytes of all weights by their type."""
    found: dict[str, bytes] = {}
    for node in model.model.get_ordered_ops():
        kind = node.get_element_type().get_type_name() if node.get_type_name() == "Constant" else ""
        if kind and node.get_byte_size() >= 1024:
            found[kind] = found.get(kind, b"") + node.data.tobytes()
    return found


@torch.no_grad()
def distance(model: OVModelForCausalLM, tiny: Path) -> float:
    original = transformers.AutoModelForCausalLM.from_pretrained(tiny, dtype="float32")
    tokens = torch.tensor([[1, 90, 91, 92, 93, 94]])
    mine, other = (each(tokens).logits.log_softmax(-1) for each in (model, original))
    return float((other.exp() * (other - mine)).sum(-1).mean())


def test_each_wish_beside_awq_has_its_effect(tiny: Path) -> None:
    def made(**wishes: Any) -> dict[str, bytes]:
        config = OVWeightQuantizationConfig(**AWQ, **wishes)
        model = OVModelForCausalLM.from_pretrained(tiny, export=True, ov_config=EXACT, quantization_config=config)
        assert 0 < distance(model, tiny) < 0.1
        return large_constants(model)

    alone, rounded, level = made(), made(gptq=True), made(dtype="nf4")
    assert {"u4", "u8"} <= alone.keys() and "f32" not in alone  # head and embedding have 8 bits
    assert rounded["u4"] != alone["u4"] and rounded["u8"] == alone["u8"]  # GPTQ moves codes, not the head's
    assert "nf4" in level and "u4" not in level
    assert "u8" not in made(all_layers=True)
    assert "i8" in made(backup_precision="int8_sym") and "f32" in made(backup_precision="none")


def test_what_graphs_alone_have_is_scaled_in_the_graph(tiny: Path) -> None:
    for wish in (
        {"ratio": 0.5, "sensitivity_metric": "max_activation_variance"},
        {"ignored_scope": {"patterns": [".*q_proj"]}},
    ):
        config = OVWeightQuantizationConfig(**AWQ, **wish)
        made = OVModelForCausalLM.from_pretrained(tiny, export=True, ov_config=EXACT, quantization_config=config)
        rows = compression_report(made.model).layers
        assert any("awq: ratio" in row.note for row in rows)
        assert ("ignored_scope" in wish) != any("q_proj" in row.path for row in rows)
        assert {"u4", "u8"} <= large_constants(made).keys() and 0 < distance(made, tiny) < 0.1
    # A folder that holds a graph has no torch model.
    plain = OVModelForCausalLM.from_pretrained(tiny, export=True, load_in_8bit=False, compile=False)
    plain.save_pretrained(tiny.parent / "plain")
    config = OVWeightQuantizationConfig(**AWQ, tokenizer=str(tiny))
    later = OVModelForCausalLM.from_pretrained(tiny.parent / "plain", quantization_config=config, ov_config=EXACT)
    assert any("awq: ratio" in row.note for row in compression_report(later.model).layers)


@pytest.mark.parametrize(
    ("wish", "said"), [({"lora_correction": True}, "gptq=True wins"), ({"bits": 8}, "is for 4 bits: leave it out")]
)
def test_what_awq_cannot_have_is_refused(wish: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        _ = OVWeightQuantizationConfig(**AWQ | wish).of_torch


@pytest.mark.parametrize(
    ("wish", "said"),
    [
        ({"statistics_path": "here"}, "taken anew"), ({"processor": "here"}, "tokenizer= instead"),
        ({"group_size_fallback": "never"}, "has no 'never'"), ({"bits": 4, "group_size": 0}, "1 weight or more"),
    ],
)  # fmt: skip
def test_what_has_no_effect_is_refused(wish: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        OVWeightQuantizationConfig(**wish)


def test_the_fallback_of_groups_is_the_one_asked_for(tiny: Path) -> None:
    config = OVWeightQuantizationConfig(bits=4, group_size=48, group_size_fallback="error")
    with pytest.raises(RecipeError, match="groups of 48 do not divide"):
        OVModelForCausalLM.from_pretrained(tiny, export=True, quantization_config=config)


@pytest.mark.filterwarnings("ignore:the dataset:UserWarning")
def test_awq_and_gptq_of_optimum_cli(tiny: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n".join(TEXTS))
    words = f"--weight-format int4 --group-size 32 --num-samples 2 --dataset {text}"
    made = {}
    for options in ("", "--awq", "--awq --gptq", "--awq --gptq --all-layers"):
        out = str(tmp_path / "out" / str(len(made)))
        asked = ["export", "openvino", "-m", str(tiny), "--no-verify", *words.split(), *options.split(), out]
        assert optimum_export.run(asked) == 0
        made[options] = large_constants(OVModelForCausalLM.from_pretrained(out))
    assert len({found["u4"] for found in made.values()}) == len(made)
    assert "u8" in made["--awq --gptq"] and "u8" not in made["--awq --gptq --all-layers"]
    with pytest.raises(RecipeError, match="groups of 48 do not divide"):
        odd = ["--weight-format", "int4", "--group-size", "48", "--group-size-fallback", "error", str(tmp_path / "no")]
        optimum_export.run(["export", "openvino", "-m", str(tiny), *odd])


def test_a_model_of_another_task_is_named_before_it_is_followed(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    bert = transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=96, **sizes))
    bert.save_pretrained(tmp_path / "bert")
    for export in (
        lambda: write_decoder(tmp_path / "bert", tmp_path / "out"),
        lambda: OVModelForCausalLM.from_pretrained(tmp_path / "bert", export=True),
    ):
        with pytest.raises(CheckpointError, match=r"is no decoder: lowbit\.openvino\.OVModelForSequenceClassification"):
            export()
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("error:.*not writable")
def test_a_graph_is_compressed_without_a_warning_of_torch(tiny: Path) -> None:
    model = OVModelForCausalLM.from_pretrained(tiny, export=True, compile=False)
    for site in find_sites(model.model):
        assert site.read().flags.writeable
    compress_weights(model.model)


def test_one_rule_for_groups_that_do_not_divide(tmp_path: Path) -> None:
    """Hidden 64, MLP 144: groups of 128 fit the first as 64, and no part of them down to 32 the second."""
    odd = tiny_model("llama", tmp_path / "odd", intermediate_size=144)
    said = r"2 of 14 products have 8 bits, since no part of 128 inputs down to 32"
    written = write_decoder(odd, tmp_path / "folder", "int4", tokenizer=False)
    assert any(re.match(said, note) for note in written.notes)
    rows = {row.path: row.format for row in written.report.layers if row.role == "linear"}
    eight = {path for path, format in rows.items() if format == "int8_channel"}
    assert eight == {f"model.layers.{layer}.mlp.down_proj" for layer in (0, 1)}
    model = OVModelForCausalLM.from_pretrained(odd, export=True, compile=False)
    with pytest.warns(UserWarning, match=said):
        made = compress_weights(model.model, "int4_sym", group_size=128)
    assert [row.format for row in compression_report(made).layers].count("int4") == 12  # in groups of 64
    for refused in (
        lambda: compress_weights(model.model, "int4_sym", group_size=7),
        lambda: write_decoder(odd, tmp_path / "no", "int4_g7", tokenizer=False),
    ):
        with pytest.raises(RecipeError, match=r"no group of 7 inputs, .* divides any of the 14 products"):
            refused()


def test_a_group_may_be_a_whole_row(tiny: Path, tmp_path: Path) -> None:
    words = ["export", "openvino", "--model", str(tiny), "--int4", "--no-verify", "--group-size"]
    assert main([*words, "-1", str(tmp_path / "out")]) == 0
    report = json.loads((tmp_path / "out" / "lowbit_report.json").read_text())
    assert {row["format"] for row in report["layers"] if row["role"] == "linear"} == {"int4_channel"}
    assert main([*words, "0", str(tmp_path / "no")]) == 2
