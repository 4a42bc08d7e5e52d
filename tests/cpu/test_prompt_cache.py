"""Prompts kept in files: the same answers with and without, read once, and every other file refused with a sentence."""

from __future__ import annotations

import io
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lowbit.cli import main
from lowbit.errors import CheckpointError
from lowbit.runtime import Model, load
from lowbit.runtime.engine import Engine
from lowbit_assets import tiny_model

PROMPT = list(range(5, 60))
PLAIN: dict[str, Any] = {"max_new_tokens": 10, "ignore_end": True}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("prompts")
    return {family: tiny_model(family, root / family) for family in ("llama", "gemma2", "gpt2")}


def steps(model: Model) -> int:
    assert isinstance(model.engine, Engine)
    return model.engine.profile(True)["steps"]


@pytest.mark.parametrize("cache", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_answers_are_the_same_with_and_without(
    family: str, cache: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    expected = load(folders[family], cache=cache).generate(PROMPT, **PLAIN).tokens
    file = tmp_path / "deep" / "prompt.cache"
    assert load(folders[family], cache=cache).generate(PROMPT, prompt_cache=file, **PLAIN).tokens == expected
    before = file.read_bytes()
    resumed = load(folders[family], cache=cache, context=100, slots=2)
    assert resumed.generate(PROMPT, prompt_cache=file, **PLAIN).tokens == expected
    assert file.read_bytes() == before  # nothing new to keep
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_a_resumed_prompt_is_not_read_again(folders: dict[str, Path], tmp_path: Path) -> None:
    file, longer = tmp_path / "prompt.cache", [*PROMPT, 7, 8, 9]
    load(folders["llama"]).generate(PROMPT, prompt_cache=file, **PLAIN)
    first, again, other = (load(folders["llama"]) for _ in range(3))
    expected = first.generate(longer, **PLAIN).tokens
    assert isinstance(again.engine, Engine)
    lengths: list[int] = []
    prefill = again.engine.prefill
    again.engine.prefill = lambda ids, slot=0: lengths.append(len(ids)) or prefill(ids, slot)  # type: ignore[method-assign,func-returns-value]
    assert again.generate(longer, prompt_cache=file, **PLAIN).tokens == expected
    assert lengths == [3]
    assert other.generate([40, 41], prompt_cache=file, **PLAIN).tokens == first.generate([40, 41], **PLAIN).tokens


def test_beams_take_prompts_from_files(folders: dict[str, Path], tmp_path: Path) -> None:
    model, file = load(folders["llama"], slots=3), tmp_path / "prompt.cache"
    expected = model.generate(PROMPT, num_beams=3, **PLAIN).tokens
    for _ in range(2):
        assert (
            load(folders["llama"], slots=3).generate(PROMPT, num_beams=3, prompt_cache=file, **PLAIN).tokens == expected
        )


def foreign(file: Path) -> None:
    file.write_bytes(b"no cache at all")


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-40])


@pytest.mark.parametrize(
    ("family", "cache", "damage", "sentence"),
    [
        ("gpt2", "fp16", None, "made with another model: name another file, or remove it"),
        (
            "llama",
            "int8",
            None,
            "holds keys and values in fp16, and this engine keeps int8: load the model with cache='fp16'",
        ),
        ("llama", "fp16", foreign, "is no prompt cache, or a damaged one"),
        ("llama", "fp16", cut, "is no prompt cache, or a damaged one"),
    ],
)
def test_other_files_are_refused(
    family: str, cache: str, damage: Any, sentence: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    file = tmp_path / "prompt.cache"
    load(folders["llama"]).generate(PROMPT, prompt_cache=file, **PLAIN)
    if damage is not None:
        damage(file)
    before = file.read_bytes()
    model = load(folders[family], cache=cache)
    with pytest.raises(CheckpointError, match=sentence):
        model.generate(PROMPT, prompt_cache=file, **PLAIN)
    assert file.read_bytes() == before
    assert len(model.generate(PROMPT, **PLAIN).tokens) == 10


def test_places_where_no_cache_can_be(folders: dict[str, Path], tmp_path: Path) -> None:
    """Told before the prompt is read, but for a disk that turns out to be full."""
    model, file = load(folders["llama"]), tmp_path / "notes.txt"
    file.write_text("mine")
    for path, sentence in (
        (tmp_path, "is a folder: name a file"),
        (file / "below", "cannot be written: name a file in a"),
    ):
        with pytest.raises(CheckpointError, match=sentence):
            model.generate(PROMPT, prompt_cache=path, **PLAIN)
    assert file.read_text() == "mine" and len(model.slots[0].tokens) == 0
    with pytest.raises(CheckpointError, match="was not written: File name too long"):
        model.generate(PROMPT, prompt_cache=tmp_path / ("x" * 250), **PLAIN)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    try:
        with pytest.raises(CheckpointError, match="was not written: "):
            model.generate(PROMPT, prompt_cache=tmp_path / "prompt.cache", **PLAIN)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_context_that_is_too_short_is_said(folders: dict[str, Path], tmp_path: Path) -> None:
    file = tmp_path / "prompt.cache"
    load(folders["llama"]).generate(PROMPT, prompt_cache=file, **PLAIN)
    with pytest.raises(
        CheckpointError, match="cannot be taken up: a saved cache of 55 tokens does not fit a context of 40"
    ):
        load(folders["llama"], context=40).generate(PROMPT[:30], prompt_cache=file, **PLAIN)


def test_another_model_of_the_same_shape_is_told_apart(folders: dict[str, Path], tmp_path: Path) -> None:
    other = load(tiny_model("llama", tmp_path / "other", seed=5))
    assert isinstance(other.engine, Engine)
    same = load(folders["llama"]).engine, load(folders["llama"]).engine
    names = {engine.identity["model"] for engine in (*same, other.engine)}  # type: ignore[attr-defined]
    assert len(names) == 2


# --- on the command line ---------------------------------------------------------------------------------------------


def test_generate_and_chat_keep_prompts(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "prompt.cache"
    common = [str(folders["llama"]), "--engine", "lowbit", "--max-new-tokens", "6", "--temperature", "0"]
    answers = []
    for extra in ([], ["--prompt-cache", str(file)], ["--prompt-cache", str(file)]):
        assert main(["generate", *common, "--prompt", "Hello there", *extra]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] == answers[2] and file.is_file()
    said = []
    for extra in (
        [],
        ["--prompt-cache", str(tmp_path / "chat.cache")],
        ["--prompt-cache", str(tmp_path / "chat.cache")],
    ):
        monkeypatch.setattr("sys.stdin", io.StringIO("Hello\nAnd now?\n"))
        assert main(["chat", *common, *extra]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] == said[2]


@pytest.mark.parametrize("flag", [["--check"], ["--prompt-cache", "x.cache"]])
def test_the_path_through_transformers_has_neither(
    flag: list[str], folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", str(folders["llama"]), "--engine", "transformers", "--prompt", "Hello", *flag]) != 0
    assert "add --engine lowbit" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["generate", "chat", "evaluate"])
def test_check_names_the_layer(
    command: str,
    folders: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from safetensors.numpy import load_file, save_file

    for path in folders["llama"].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"] = np.full_like(
        tensors["model.layers.1.mlp.down_proj.weight"], np.nan
    )
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "text.txt").write_text("some words " * 20)
    extra = {
        "generate": ["--prompt", "Hello"],
        "chat": [],
        "evaluate": ["--text", str(tmp_path / "text.txt"), "--window", "16"],
    }[command]
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n"))
    for flag, sentence in (
        ([], "the logits are not numbers"),
        (["--check"], "in layer 1, in the down projection of the MLP"),
    ):
        monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n"))
        main([command, str(tmp_path), "--engine", "lowbit", *extra, *flag])
        assert sentence in capsys.readouterr().err
