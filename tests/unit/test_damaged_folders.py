"""Every file of a saved model cut, emptied, garbled and contradicted: each ends in an answer or in one sentence."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import lowbit
from lowbit.cli import FAILED, OK, main
from lowbit.runtime import load
from unit.checkpoint_cases import EVEN, make

Damage = Callable[[Path], object]
WRONG: tuple[Any, ...] = ("sixty", [])


def cut(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


def becomes_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def write(content: bytes, file: Path) -> None:
    file.write_bytes(content)


def set_field(path: tuple[str, ...], value: Any, file: Path) -> None:
    fields = place = json.loads(file.read_text())
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = value
    file.write_text(json.dumps(fields))


def set_entry(key: str, value: Any, file: Path) -> None:
    """Contradict the first entry of a safetensors header."""
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    entry = header[next(name for name in header if name != "__metadata__")]
    entry[key] = value
    if value is None:
        del entry[key]
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


ANY_FILE: tuple[Damage, ...] = (
    cut,
    becomes_folder,
    *(partial(write, content) for content in (b"\xff\xfe\x00 no text", b"[]", b"{}")),
)
HEADERS = [
    ("data_offsets", None), ("data_offsets", ["a", "b"]), ("data_offsets", [1]), ("data_offsets", [64, 0]),
    ("shape", None), ("shape", ["x"]), ("shape", [-1, 64]), ("shape", 5), ("dtype", None), ("dtype", "Q7"), ("dtype", 3),
]  # fmt: skip
FIELDS = [
    ("hidden_size",), ("num_hidden_layers",), ("hidden_act",), ("rms_norm_eps",), ("vocab_size",), ("rope_parameters",),
    ("max_position_embeddings",), ("architectures",), ("model_type",), ("dtype",),
]  # fmt: skip
PACKED_FIELDS = [
    ("quantization_config",), ("quantization_config", "quant_method"), ("quantization_config", "config_groups"),
    ("quantization_config", "config_groups", "group_0"),
]  # fmt: skip
SETTINGS = [
    "eos_token_id", "pad_token_id", "temperature", "top_k", "repetition_penalty", "num_beams", "max_new_tokens", "min_length",
    "bad_words_ids",
]  # fmt: skip


def damages(folder: Path) -> Iterator[tuple[str, Damage]]:
    for name in sorted(path.name for path in folder.iterdir() if path.name != "lowbit_report.json"):
        yield from ((name, damage) for damage in ANY_FILE)
    yield from (("model.safetensors", partial(set_entry, *entry)) for entry in HEADERS)
    yield from (("generation_config.json", partial(set_field, (name,), value)) for name in SETTINGS for value in WRONG)
    yield "tokenizer_config.json", partial(set_field, ("model_max_length",), "sixty")
    fields = FIELDS + (PACKED_FIELDS if folder.name == "low" else [])
    yield from (("config.json", partial(set_field, field, value)) for field in fields for value in WRONG)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("damage")
    make("llama", home / "dense", **EVEN)
    assert main(["quantize", str(home / "dense"), str(home / "low"), "--format", "int5"]) == OK
    (home / "text.txt").write_text("a text to be predicted, " * 9)
    return home


def commands(folder: Path, home: Path) -> list[list[str]]:
    tail = ["--raw", "--max-new-tokens", "2", "--prompt", "hi"]
    found = [
        ["inspect", str(folder)],
        ["generate", str(folder), *tail, "--engine", "lowbit"],
        ["generate", str(folder), *tail, "--engine", "transformers"],
    ]
    if home.joinpath("kind").read_text() == "dense":
        return [*found, ["quantize", str(folder), str(home / "out"), "--force"]]
    return [*found, ["evaluate", str(folder), "--text", str(home / "text.txt"), "--window", "16", "--windows", "1"]]


def one_outcome(action: Callable[[], object]) -> str:
    """What a Python entry says: nothing, or one sentence. Whatever is no LowbitError ends the test."""
    try:
        action()
    except lowbit.LowbitError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("kind", ["dense", "low"])
def test_damage_ends_in_one_sentence(
    folders: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (folders / "kind").write_text(kind)
    said = 0
    for name, damage in damages(folders / kind):
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        copy = Path(shutil.copytree(folders / kind, tmp_path / "copy"))
        damage(copy / name)
        for words in commands(copy, folders):
            capsys.readouterr()
            code = main(words)
            errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lowbit: error: ")]
            assert code in (OK, FAILED) and len(errors) == (code == FAILED), (name, damage, words)
            said += code == FAILED
        low_bit = {"load_in_4bit": True} if kind == "dense" else {}
        for entry in (partial(lowbit.AutoModelForCausalLM.from_pretrained, copy, **low_bit), partial(load, copy)):
            assert "\n" not in one_outcome(entry), (name, damage)
    assert said > 100


def test_layers_that_the_config_does_not_have(folders: Path, tmp_path: Path) -> None:
    for kind in ("dense", "low"):
        copy = Path(shutil.copytree(folders / kind, tmp_path / kind))
        set_field(("num_hidden_layers",), 1, copy / "config.json")
        for entry in (partial(lowbit.AutoModelForCausalLM.from_pretrained, copy), partial(load, copy)):
            assert "model.layers.1." in one_outcome(entry)
    fewer = lowbit.AutoModelForCausalLM.from_pretrained(folders / "dense", num_hidden_layers=1)
    assert len(fewer.model.layers) == 1


def test_tensors_that_the_config_denies_are_told(folders: Path, tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.bias"
    for kind in ("dense", "low"):
        copy = Path(shutil.copytree(folders / kind, tmp_path / kind))
        assert not load(copy).notes
        tensors = load_file(copy / "model.safetensors")
        save_file({**tensors, name: torch.zeros(64)}, copy / "model.safetensors", metadata={"format": "pt"})
        assert f"1 tensors have no place in the model that config.json describes ({name} ...)" in load(copy).notes
        with pytest.warns(UserWarning, match=f"1 tensors have no place in the model: {name}"):
            lowbit.AutoModelForCausalLM.from_pretrained(copy)


def test_settings_that_nothing_can_follow(folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = Path(shutil.copytree(folders / "low", tmp_path / "copy"))
    file = copy / "generation_config.json"
    for field, value, code in (("eos_token_id", "sixty", FAILED), ("temperature", -1, FAILED), ("num_beams", 4, OK)):
        file.write_text(json.dumps({"do_sample": True, field: value}))
        for engine in ("lowbit", "transformers"):
            words = ["generate", str(copy), "--raw", "--max-new-tokens", "2", "--prompt", "hi", "--engine", engine]
            assert main(words) == code
            said = capsys.readouterr().err
            assert len(said.splitlines()) == 1 and (code == OK or (f"{field}" in said and str(value) in said))


def test_methods_that_nobody_reads(folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = Path(shutil.copytree(folders / "dense", tmp_path / "copy"))
    set_field(("quantization_config",), {"quant_method": "foo"}, copy / "config.json")
    for entry in (partial(lowbit.AutoModelForCausalLM.from_pretrained, copy), partial(load, copy)):
        assert "is quantised with" in (said := one_outcome(entry)) and "foo" in said and "compressed-tensors" in said
    assert main(["generate", str(copy), "--prompt", "hi"]) == FAILED
    assert "lowbit: error: " in (said := capsys.readouterr().err) and "cannot be read here" in said
