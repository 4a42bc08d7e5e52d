"""Bad input: each case ends in one clear sentence, and nothing is half done."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lowbit
from lowbit import CheckpointError
from lowbit.checkpoint import exchange
from lowbit.checkpoint.save import parse_size
from lowbit.cli import FAILED, main
from unit.checkpoint_cases import EVEN, make, small_files

pytestmark = pytest.mark.transformers
Auto = lowbit.AutoModelForCausalLM
QUERY = "model.layers.0.self_attn.q_proj"
BUFFERS = {"low": f"{QUERY}.weight_packed", "own": f"{QUERY}.packed_weight.codes"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One model dense, as compressed-tensors and in lowbit's own form."""
    home = tmp_path_factory.mktemp("bad")
    make("llama", home / "dense", **EVEN)
    for name, low_bit in (("low", "int5"), ("own", "nf4")):
        Auto.from_pretrained(home / "dense", load_in_low_bit=low_bit).save_low_bit(home / name)
    return home


def copy_of(folders: Path, kind: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folders / kind, tmp_path / "copy"))


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(
        {name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"}
    )
    return folder


def refused(folder: Path, error: type[Exception] = lowbit.CheckpointError, **keywords: object) -> str:
    with pytest.raises(error) as caught:
        Auto.from_pretrained(folder, **keywords)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("kind", ["dense", "low", "own"])
def test_truncated_and_missing_files(folders: Path, tmp_path: Path, kind: str) -> None:
    folder = copy_of(folders, kind, tmp_path)
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    assert "model.safetensors is truncated" in refused(folder, load_in_4bit=kind == "dense")
    file.write_bytes(whole[:5])
    assert "truncated or no safetensors" in refused(folder, load_in_4bit=kind == "dense")
    file.unlink()
    assert "holds no weights" in refused(folder, load_in_4bit=kind == "dense")


def test_shard_that_the_index_names_is_missing(folders: Path, tmp_path: Path) -> None:
    Auto.load_low_bit(folders / "low").save_low_bit(tmp_path / "sharded", max_shard_size="40KB")
    shard = sorted((tmp_path / "sharded").glob("*.safetensors"))[1]
    shard.unlink()
    assert f"lacks 1 of its 4 files of weights ({shard.name}" in refused(tmp_path / "sharded")


def test_nan_is_named(folders: Path, tmp_path: Path) -> None:
    folder = edit(
        copy_of(folders, "dense", tmp_path), lambda t: t[f"{QUERY}.weight"].view(-1).__setitem__(7, torch.nan)
    )
    message = refused(folder, lowbit.WeightError, load_in_4bit=True)
    assert QUERY in message and "[0, 7]" in message


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.uint8, torch.bool], ids=str)
def test_codes_that_the_config_does_not_explain(folders: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    folder = edit(
        copy_of(folders, "dense", tmp_path),
        lambda t: t.__setitem__(f"{QUERY}.weight", (t[f"{QUERY}.weight"] * 100).to(dtype)),
    )
    for keywords in ({"load_in_4bit": True}, {}):
        message = refused(folder, **keywords)
        assert f"{QUERY}.weight holds" in message and "does not say how they are quantised" in message


def test_a_name_that_transformers_does_not_know(folders: Path, tmp_path: Path) -> None:
    folder = copy_of(folders, "dense", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "helix", "rope_theta": 1e4}
    (folder / "config.json").write_text(json.dumps(config))
    assert "its files name 'helix', which transformers does not know" in refused(folder, load_in_4bit=True)


def test_shapes_that_disagree_with_the_config(folders: Path, tmp_path: Path) -> None:
    folder = copy_of(folders, "dense", tmp_path)
    edit(folder, lambda t: t.__setitem__(f"{QUERY}.weight", torch.zeros(32, 64)))
    assert f"{QUERY}.weight has shape [32, 64]" in refused(folder, load_in_4bit=True)
    edit(folder, lambda t: t.update({f"{QUERY}.weight": torch.zeros(64, 64), "model.norm.weight": torch.zeros(32)}))
    message = refused(folder, load_in_4bit=True)
    assert "other shapes than config.json says" in message or "model.norm.weight has shape [32]" in message


@pytest.mark.parametrize("kind", ["low", "own"])
def test_packed_weights_that_are_not_whole(folders: Path, tmp_path: Path, kind: str) -> None:
    folder, name = copy_of(folders, kind, tmp_path), BUFFERS[kind]
    edit(folder, lambda t: t.__setitem__(name, t[name][:16]))
    assert QUERY in refused(folder)
    edit(folder, lambda t: t.pop(name))
    assert f"{QUERY}: the checkpoint lacks its" in refused(folder)
    edit(folder, lambda t: [t.pop(key) for key in list(t) if key.startswith(f"{QUERY}.")])
    assert f"lacks the packed weight {QUERY}" in refused(folder)


def test_layer_that_a_dense_checkpoint_lacks(folders: Path, tmp_path: Path) -> None:
    folder = edit(copy_of(folders, "dense", tmp_path), lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))
    assert "lacks model.layers.1.mlp.up_proj.weight" in refused(folder, load_in_4bit=True)


def test_config_that_names_an_unknown_format(folders: Path, tmp_path: Path) -> None:
    folder = copy_of(folders, "own", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["layers"] = {"int97": [QUERY]}
    (folder / "config.json").write_text(json.dumps(config))
    assert "unknown format 'int97'" in refused(folder, lowbit.FormatError)
    assert "unknown format 'int44'" in refused(folders / "dense", lowbit.FormatError, load_in_low_bit="int44")


def test_folder_that_is_not_a_model(folders: Path, tmp_path: Path) -> None:
    assert "has no config.json" in refused(tmp_path, load_in_4bit=True)
    (tmp_path / "config.json").write_text("{}")
    assert "no model_type" in refused(tmp_path, load_in_4bit=True)
    (tmp_path / "config.json").write_text("{")
    assert "not valid JSON" in refused(tmp_path, load_in_4bit=True)
    with pytest.raises(lowbit.CheckpointError, match="full precision"):
        Auto.load_low_bit(folders / "dense")
    with pytest.raises(lowbit.CheckpointError, match="there is no file or folder"):
        Auto.load_low_bit(tmp_path / "nowhere")


def test_pickles_only_where_they_are_trusted(folders: Path, tmp_path: Path) -> None:
    folder = copy_of(folders, "dense", tmp_path)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert "allow_pickle=True" in refused(folder, load_in_4bit=True)
    assert "allow_pickle=True" in refused(folder)
    assert Auto.from_pretrained(folder, load_in_4bit=True, allow_pickle=True).lowbit_report.layers


def test_a_pickle_beside_safetensors_of_another_name_stays_where_it_is(folders: Path, tmp_path: Path) -> None:
    folder = copy_of(folders, "dense", tmp_path)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    assert "allow_pickle=True" in refused(folder, use_safetensors=False)
    (folder / "model.safetensors").rename(folder / "consolidated.safetensors")
    assert "model.safetensors" in refused(folder, load_in_4bit=True)
    assert Auto.from_pretrained(folder, load_in_4bit=True, allow_pickle=True).lowbit_report.layers


def test_a_pickle_that_is_cut(folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = copy_of(folders, "dense", tmp_path)
    file = folder / "pytorch_model.bin"
    torch.save(load_file(folder / "model.safetensors"), file)
    (folder / "model.safetensors").unlink()
    whole = file.read_bytes()
    for length in (len(whole) // 2, 40, 0):
        file.write_bytes(whole[:length])
        for low_bit in ({"load_in_4bit": True}, {}):
            assert str(folder) in refused(folder, allow_pickle=True, **low_bit)
        assert main(["quantize", str(folder), str(tmp_path / "out"), "--allow-pickle"]) == FAILED
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and lines[0].startswith(f"lowbit: error: {folder}")
    assert not (tmp_path / "out").exists()


WAYS = pytest.mark.parametrize("way", ["save_low_bit", "save_pretrained"])


@WAYS
def test_full_disk_leaves_the_old_folder_or_none(folders: Path, tmp_path: Path, way: str) -> None:
    model = Auto.load_low_bit(folders / "own")
    low = copy_of(folders, "low", tmp_path)
    before = {path.name: path.read_bytes() for path in low.iterdir()}
    with small_files(20_000):
        for target in (low, tmp_path / "new"):
            with pytest.raises(lowbit.CheckpointError, match="cannot save to"):
                getattr(model, way)(target)
    assert {path.name: path.read_bytes() for path in low.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_saving_never_destroys_something_else(folders: Path, tmp_path: Path) -> None:
    model = Auto.from_pretrained(folders / "dense", load_in_4bit=True)
    for save in (model.save_low_bit, model.save_pretrained):
        with pytest.raises(lowbit.CheckpointError, match="full-precision model"):
            save(folders / "dense")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(lowbit.CheckpointError, match="not a model"):
        model.save_low_bit(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


@WAYS
def test_home_is_the_same_place_for_saving_and_loading(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    model = Auto.load_low_bit(folders / "own")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    getattr(model, way)("~/low")
    assert [path.name for path in tmp_path.iterdir()] == ["low"]
    for again in (Auto.from_pretrained("~/low"), Auto.load_low_bit("~/low"), lowbit.load_low_bit(model, "~/low")):
        assert again.lowbit_report.layers


def test_targets_and_tokenizers_that_are_none(folders: Path, tmp_path: Path) -> None:
    model, file = Auto.load_low_bit(folders / "own"), tmp_path / "notes.txt"
    file.write_text("mine")
    for save in (model.save_low_bit, model.save_pretrained):
        for target, said in ((file, "it is a file"), (file / "deep" / "low", "notes.txt is a file")):
            with pytest.raises(lowbit.CheckpointError, match=said):
                save(target)
    with pytest.raises(lowbit.CheckpointError, match="give the tokenizer or processor itself"):
        model.save_low_bit(tmp_path / "low", tokenizer="gpt2")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_nothing_to_pack_is_said(folders: Path) -> None:
    message = refused(
        folders / "dense", lowbit.RecipeError, load_in_4bit=True, modules_to_not_convert=["model", "lm_head"]
    )
    assert "nothing was packed" in message


def test_sizes() -> None:
    assert [parse_size(size) for size in (7, "5GB", "500 MiB", "1.5kb")] == [7, 5 * 10**9, 500 << 20, 1500]
    for wrong in ("", "many", "-3", "0"):
        with pytest.raises(lowbit.CheckpointError):
            parse_size(wrong)


@WAYS
def test_an_interrupted_exchange_of_folders_keeps_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    model = Auto.from_pretrained(make("llama", tmp_path / "dense"), load_in_4bit=True)
    model.save_low_bit(tmp_path / "low")
    before = (tmp_path / "low" / "config.json").read_bytes()
    rename = Path.rename

    def interrupted(self: Path, target: Path) -> Path:
        if ".partial-" in self.name:
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(exchange, "_exchange_at_once", lambda one, other: False)  # where there is no such call
        patch.setattr(Path, "rename", interrupted)
        with pytest.raises(KeyboardInterrupt):
            getattr(model, way)(tmp_path / "low")
    assert (tmp_path / "low" / "config.json").read_bytes() == before
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["dense", "low"]


def test_other_peoples_models_are_not_replaced(tmp_path: Path) -> None:
    make("llama", tmp_path / "other")
    model = Auto.from_pretrained(make("llama", tmp_path / "dense"), load_in_4bit=True)
    with pytest.raises(CheckpointError, match="lowbit did not write"):
        model.save_low_bit(tmp_path / "other")
