"""Who runs a model: the engine what it can, transformers the rest, and the command says why."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import lowbit
from lowbit.cli import main
from lowbit.cli.engine_session import EngineSession
from lowbit.cli.engines import open_session
from lowbit.cli.options import CACHES, LoadOptions, Sampling
from lowbit.cli.session import Session
from lowbit.cli.source import find_source
from lowbit.errors import LowbitError
from lowbit.recipe import recipe_named
from lowbit.runtime.abi import CACHE_TYPES
from lowbit.runtime.loading import LONGEST_DEFAULT_CONTEXT
from lowbit_assets import tiny_model, tiny_model_in_memory
from lowbit_assets.tiny import write_byte_tokenizer

GREEDY = Sampling(8, temperature=0, ignore_end=True)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("llama", tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small") / "model"
    lowbit.optimize_model(tiny_model_in_memory("llama"), low_bit="int4_g32").save_low_bit(folder)
    write_byte_tokenizer(folder)
    return folder


def session_of(folder: Path, **options: object) -> Session | EngineSession:
    return open_session(find_source(str(folder)), LoadOptions(**options))  # type: ignore[arg-type]


def test_low_bit_models_run_on_the_engine(small: Path, plain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert isinstance(session_of(small), EngineSession)
    assert isinstance(session_of(plain, recipe=recipe_named("int4")), EngineSession)
    assert isinstance(session_of(plain), Session)
    assert isinstance(session_of(plain, engine="lowbit"), EngineSession)
    assert isinstance(session_of(small, engine="transformers"), Session)
    assert "through transformers" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"dtype": "bfloat16"}, "the engine does not cast models to bfloat16"),
        ({"trust_remote_code": True}, "it may bring code of its own"),
        ({"recipe": recipe_named("q4_k")}, "weights become q4_k with torch only"),
    ],
    ids=["dtype", "code", "format"],
)
def test_what_the_engine_cannot_run_is_said_once(
    options: dict[str, object], reason: str, plain: Path, small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = plain if "recipe" in options else small
    assert isinstance(session_of(folder, **options), Session)
    said = [line for line in capsys.readouterr().err.splitlines() if "runs through transformers" in line]
    assert len(said) == 1 and reason in said[0]
    with pytest.raises(LowbitError, match=reason):
        session_of(folder, engine="lowbit", **options)


def test_both_sessions_agree(plain: Path) -> None:
    ours, theirs = session_of(plain, engine="lowbit"), session_of(plain, engine="transformers")
    assert ours.encode("Hi", system="Brief.") == theirs.encode("Hi", system="Brief.")
    assert ours.encode("Hi", raw=True) == theirs.encode("Hi", raw=True)
    assert ours.plain_tokens("Hi") == theirs.plain_tokens("Hi")
    assert (ours.context_length, ours.vocabulary) == (theirs.context_length, theirs.vocabulary)
    pieces: list[str] = []
    answer = ours.generate(ours.encode("Hi"), GREEDY, pieces.append)
    assert "".join(pieces) == answer.text
    assert (answer.prompt_tokens, answer.new_tokens) == (len(ours.encode("Hi")), 8)
    assert answer.text == theirs.generate(theirs.encode("Hi"), GREEDY).text


def test_commands_take_the_engine(small: Path, plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("A whale is not a fish. " * 10)
    assert main(["evaluate", str(small), "--text", str(text), "--window", "32", "--against", str(plain), "--json"]) == 0
    ours = json.loads(capsys.readouterr().out)
    assert (
        main(["evaluate", str(small), "--text", str(text), "--window", "32", "--engine", "transformers", "--json"]) == 0
    )
    theirs = json.loads(capsys.readouterr().out)
    assert ours["perplexity"] == pytest.approx(theirs["perplexity"], rel=0.02)
    words = ["bench", str(small), "--prompt-tokens", "8", "--new-tokens", "4", "--rounds", "1", "--json", "--profile"]
    assert main(words) == 0
    printed = capsys.readouterr()
    timed = json.loads(printed.out)
    assert timed["new_tokens"] == 4
    assert timed["profile"]["later"]["steps"] == 3 and timed["profile"]["prompt"]["mlp"] > 0
    assert "waiting for other threads" in printed.err
    assert main([*words, "--engine", "transformers"]) == 1
    assert "leave out --profile" in capsys.readouterr().err


def test_a_context_of_ones_own(small: Path, plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["generate", str(small), "--raw", "--max-new-tokens", "99", "--temperature", "0", "--prompt"]
    assert main([*words, "x" * 20, "--context", "24", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["new_tokens"] <= 4
    for length, remedy in (
        (60, "shorten it, or load the model with a longer one, up to 128 (context=, --context)"),
        (200, "shorten it"),
    ):
        assert main([*words, "x" * length, "--context", "40"]) == 1
        assert capsys.readouterr().err.endswith(
            f"has {length} tokens and leaves no room for an answer in a context of 40: {remedy}\n"
        )
    assert main([*words, "x", "--context", "129"]) == 1
    assert "context=129 is out of range; this model was made for 1 to 128 tokens" in capsys.readouterr().err
    for option in (["--context", "40"], ["--check"], ["--cache", "int8"], ["--within-window"]):
        assert main(["generate", str(plain), "--prompt", "x", *option]) == 1
        assert f"{option[0]} belongs to lowbit's own engine" in capsys.readouterr().err
    assert main(["bench", "--help"]) == 0
    assert f"at most {LONGEST_DEFAULT_CONTEXT}" in capsys.readouterr().out


def test_the_cache_is_named_and_shown(small: Path, plain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert set(CACHES) == set(CACHE_TYPES)
    words = ["--engine", "lowbit", "--prompt-tokens", "8", "--new-tokens", "4", "--rounds", "1"]
    for folder, extra, cache in (
        (small, [], "int8"),
        (plain, [], "fp16"),
        (small, ["--cache", "fp32"], "fp32"),
        (plain, ["--format", "int4"], "int8"),
    ):
        assert main(["bench", str(folder), *words, *extra]) == 0
        assert re.search(rf"keys and values +{cache}\n", capsys.readouterr().out)
    assert main(["bench", str(small), *words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["cache"] == "int8"
    assert main(["doctor"]) == 0
    assert "int8 where the weights are low-bit" in " ".join(capsys.readouterr().out.split())


def test_a_prompt_beyond_the_sliding_window_is_refused_where_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(tiny_model("mistral", tmp_path / "mistral"))
    words = ["generate", folder, "--engine", "lowbit", "--raw", "--max-new-tokens", "2", "--prompt"]
    assert main([*words, "x" * 60]) == main([*words, "x" * 4, "--within-window"]) == 0
    capsys.readouterr()
    assert main([*words, "x" * 60, "--within-window"]) == 1
    assert "the prompt has 60 tokens and the model's sliding window shows 8: shorten it" in capsys.readouterr().err


def test_commands_run_without_torch(small: Path, plain: Path) -> None:
    block = "import sys\nfor name in ('torch', 'transformers'): sys.modules[name] = None\n"
    for folder in (small, plain):
        words = ["generate", str(folder), "--prompt", "Hi", "--max-new-tokens", "5", "--json", "--temperature", "0"]
        code = f"{block}from lowbit.cli import main\nsys.exit(main({words!r}))"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert 1 <= json.loads(done.stdout)["new_tokens"] <= 5


def test_perplexity_is_the_same_without_torch(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("A whale is not a fish, whatever the sailors say. " * 4)
    words = ["evaluate", str(small), "--text", str(text), "--window", "32", "--json"]
    assert main(words) == 0
    with_torch = json.loads(capsys.readouterr().out)
    code = f"import sys\nsys.modules['torch'] = None\nfrom lowbit.cli import main\nsys.exit(main({words!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    without = json.loads(done.stdout)
    assert without.keys() == with_torch.keys()
    for name in ("perplexity", "nll", "nll_standard_error", "tokens", "windows"):
        assert without[name] == pytest.approx(with_torch[name], rel=1e-5), name


def test_a_folder_that_nobody_can_run_is_refused_once_and_at_the_start(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n"))
    for damage, sentence in (("tokenizer.json", "has no tokenizer.json"), ("model.safetensors", "is truncated")):
        folder = tmp_path / damage
        shutil.copytree(small, folder)
        if damage == "tokenizer.json":
            (folder / damage).unlink()
        else:
            os.truncate(folder / damage, (folder / damage).stat().st_size // 2)
        assert main(["chat", str(folder)]) == 1
        assert capsys.readouterr().err.count(sentence) == 1


@pytest.mark.parametrize("asked", [["--prompt", "-"], ["--prompt-file", "-"]], ids=lambda words: words[0])
def test_a_prompt_may_come_from_stdin(
    asked: list[str], small: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    common = ["generate", str(small), "--max-new-tokens", "4", "--temperature", "0"]
    assert main([*common, "--prompt", "Hello\n"]) == 0
    expected = capsys.readouterr().out
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n"))
    assert main([*common, *asked]) == 0
    assert capsys.readouterr().out == expected
