"""`model.save_pretrained` of a low-bit model, and the packed embedding that lies beside a folder for other readers."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open

import lowbit
from unit.checkpoint_cases import EVEN, logits, make

pytestmark = pytest.mark.transformers
Auto = lowbit.AutoModelForCausalLM


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_the_rest_of_a_folder_stays_and_old_weights_go(tmp_path: Path) -> None:
    model = Auto.from_pretrained(make("llama", tmp_path / "dense", **EVEN), load_in_4bit=True)
    target = tmp_path / "out"
    (target / "checkpoint-1").mkdir(parents=True)
    (target / "checkpoint-1" / "state.bin").write_text("a trainer's")
    (target / "notes.txt").write_text("mine")
    model.save_pretrained(target, max_shard_size="40KB")
    assert {"checkpoint-1/state.bin", "notes.txt", "lowbit_report.json", "model.safetensors.index.json"} <= names(
        target
    )
    model.save_pretrained(target)
    left = names(target)
    assert {"checkpoint-1/state.bin", "notes.txt", "lowbit_report.json", "model.safetensors"} <= left
    assert not [name for name in left if "-of-" in name or name.endswith("index.json")]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "out"]
    assert torch.equal(logits(transformers.AutoModelForCausalLM.from_pretrained(target)), logits(model))


def test_a_copy_and_a_model_made_in_place_save_themselves(tmp_path: Path) -> None:
    dense = transformers.AutoModelForCausalLM.from_pretrained(make("llama", tmp_path / "dense", **EVEN))
    model = lowbit.optimize_model(dense)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.norm.weight.mul_(2)
    other.save_pretrained(tmp_path / "other")
    assert torch.equal(logits(Auto.load_low_bit(tmp_path / "other")), logits(other))
    assert not torch.equal(logits(other), logits(model))


def test_saving_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    folder = make("llama", tmp_path / "dense", **EVEN, tie_word_embeddings=True)
    model = Auto.from_pretrained(folder, load_in_4bit=True)
    for _ in range(2):
        model.save_pretrained(tmp_path / "low")
        assert model.config.tie_word_embeddings is True
        assert json.loads((tmp_path / "low" / "config.json").read_text())["tie_word_embeddings"] is False
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "low")
    assert again.lm_head.packed_weight is again.model.embed_tokens.packed_weight


def test_a_model_that_is_dense_again_is_saved_by_transformers(tmp_path: Path) -> None:
    model = Auto.from_pretrained(make("llama", tmp_path / "dense", **EVEN), load_in_4bit=True)
    model.dequantize()
    model.save_pretrained(tmp_path / "again")
    assert "quantization_config" not in json.loads((tmp_path / "again" / "config.json").read_text())
    assert "lowbit_report.json" not in names(tmp_path / "again")


@pytest.mark.parametrize("way", ["save_low_bit", "save_pretrained"])
def test_an_embedding_that_is_not_tied_comes_back_packed(tmp_path: Path, way: str) -> None:
    model = Auto.from_pretrained(make("llama", tmp_path / "dense", **EVEN), load_in_4bit=True, dtype=torch.bfloat16)
    expected, table = logits(model), model.model.embed_tokens.packed_weight.packed()
    getattr(model, way)(tmp_path / "low")
    with safe_open(tmp_path / "low" / "model.safetensors", framework="pt") as opened:
        assert opened.get_slice("model.embed_tokens.weight").get_dtype() == "BF16"  # what other readers look for
    for loader in (transformers.AutoModelForCausalLM, Auto):
        again = loader.from_pretrained(tmp_path / "low")
        packed = again.model.embed_tokens.packed_weight.packed()
        assert packed.format == table.format and torch.equal(packed.codes, table.codes)
        assert torch.equal(logits(again), expected)
    getattr(again, way)(tmp_path / "again")
    assert torch.equal(logits(Auto.load_low_bit(tmp_path / "again")), expected)


def test_a_folder_without_the_packed_embedding_loads_and_says_so(tmp_path: Path) -> None:
    model = Auto.from_pretrained(make("llama", tmp_path / "dense", **EVEN), load_in_4bit=True)
    model.save_low_bit(tmp_path / "low")
    shutil.rmtree(tmp_path / "low" / "lowbit")
    again = Auto.load_low_bit(tmp_path / "low")
    assert type(again.model.embed_tokens) is torch.nn.Embedding
    assert torch.allclose(logits(again), logits(model), atol=1e-5)
    assert [(row.path, row.bytes > 0) for row in again.lowbit_report.skipped] == [("model.embed_tokens", True)]


def test_a_packed_embedding_that_is_not_whole_is_named(tmp_path: Path) -> None:
    model = Auto.from_pretrained(make("llama", tmp_path / "dense", **EVEN), load_in_4bit=True)
    model.save_low_bit(tmp_path / "low")
    file = tmp_path / "low" / "lowbit" / "embedding.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(lowbit.CheckpointError, match=r"embedding.safetensors cannot be read"):
        Auto.load_low_bit(tmp_path / "low")
