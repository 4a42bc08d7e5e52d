"""The commands that run a model, from their arguments to what they print, on tiny models."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lowbit.cli import FAILED, INTERRUPTED, OK, main
from lowbit_assets import smollm2_gguf, tiny_model

GREEDY = ["--max-new-tokens", "8", "--temperature", "0"]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in full precision."""
    return tiny_model("llama", tmp_path_factory.mktemp("dense") / "llama")


@pytest.fixture(scope="module")
def small(dense: Path) -> Path:
    """The same as int4, made by the command."""
    folder = dense.parent / "small"
    assert main(["quantize", str(dense), str(folder)]) == OK
    return folder


def json_of(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    """What a command prints with --json, which must be JSON and nothing else."""
    capsys.readouterr()
    assert main([*map(str, arguments), "--json"]) == OK
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def failure_of(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line of a command that fails."""
    capsys.readouterr()
    assert main([*map(str, arguments)]) == FAILED
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("lowbit: error: "), lines
    return lines[0]


# --- quantize --------------------------------------------------------------------------------------------------------


def test_quantize_reports_what_it_did(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["quantize", str(dense), str(out)]) == OK
    text = capsys.readouterr().out
    for word in ("size", "bits per weight", "error", "kernels", "errors in model.layers", f"saved in {out}"):
        assert word in text
    assert (out / "tokenizer.json").is_file()
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_quantize_as_json(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--format", "nf4", "--skip", "down_proj", "--override", "q_proj$=int8", "--override", "k_proj$=none"]
    found = json_of(capsys, "quantize", dense, tmp_path / "out", *options, "--rounder", "plain_rtn", "--head", "int6")
    formats = {row["path"].rpartition(".")[2]: row["format"] for row in found["layers"]}
    assert (formats["up_proj"], formats["q_proj"], formats["lm_head"]) == ("nf4", "int8", "int6")
    left = {row["path"].rpartition(".")[2]: row["reason"] for row in found["skipped"]}
    assert "down_proj" in left["down_proj"] and "override" in left["k_proj"]
    assert found["bytes_after"] < found["bytes_before"]
    assert found["bytes_on_disk"] > found["bytes_after"]


def test_inspect_sees_what_quantize_saved(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = json_of(capsys, "inspect", small)
    report = json.loads((small / "lowbit_report.json").read_text())
    formats = {row["path"]: (row["format"], row["shape"]) for row in found["layers"]}
    for row in report["layers"]:
        assert formats[row["path"]] == (row["format"], row["shape"])


def test_inspect_sees_other_formats_too(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = json_of(capsys, "quantize", dense, tmp_path / "out", "--format", "nf4", "--embedding", "int8_asym")
    formats = {
        row["path"]: (row["format"], row["shape"]) for row in json_of(capsys, "inspect", tmp_path / "out")["layers"]
    }
    for row in report["layers"]:
        assert formats[row["path"]] == (row["format"], row["shape"])


def test_force_replaces_a_model(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    json_of(capsys, "quantize", dense, out)
    assert "--force" in failure_of(capsys, "quantize", dense, out)
    assert json_of(capsys, "quantize", dense, out, "--force", "--format", "int8")["formats"].keys() == {"int8"}


def test_force_replaces_nothing_of_others(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = Path(shutil.copytree(dense, tmp_path / "other"))
    for words in (["quantize", dense, other, "--force"], ["demo", other]):
        assert "it holds a model that lowbit did not write" in failure_of(capsys, *words)
    assert sorted(path.name for path in other.iterdir()) == sorted(path.name for path in dense.iterdir())


def test_a_low_bit_model_is_no_source(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "is low-bit already (" in failure_of(capsys, "quantize", small, tmp_path / "out")
    assert "is low-bit already" in failure_of(capsys, "generate", small, "--format", "nf4", "--prompt", "Hello")


def test_a_disk_without_room_leaves_nothing(dense: Path, tmp_path: Path) -> None:
    program = (
        "import resource, sys\n"
        "from lowbit.cli import main\n"
        "import lowbit.cli.session\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))\n"  # the weights need more
        f"sys.exit(main(['quantize', {str(dense)!r}, {str(tmp_path / 'out')!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == FAILED, done.stderr
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("lowbit: error: ")
    assert list(tmp_path.iterdir()) == []


def test_truncated_weights_are_one_sentence(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(dense, broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert "model.safetensors" in failure_of(capsys, "quantize", broken, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_unknown_kinds_of_models_are_one_sentence(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(dense, tmp_path, dirs_exist_ok=True)
    (tmp_path / "config.json").write_text('{"model_type": "no-such-family"}')
    assert "no-such-family" in failure_of(capsys, "generate", tmp_path, "--prompt", "Hello")


def test_a_model_without_tokenizer_says_so(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(small, bare, ignore=shutil.ignore_patterns("token*", "special*", "*.jinja"))
    assert "has no tokenizer" in failure_of(capsys, "generate", bare, "--prompt", "Hello")


def test_a_device_that_is_not_there(dense: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    if not torch.xpu.is_available():
        assert "torch sees no xpu device" in failure_of(capsys, "generate", dense, "--prompt", "a", "--device", "xpu")
    assert "there is no device 'nonsense'" in failure_of(
        capsys, "generate", dense, "--prompt", "a", "--device", "nonsense"
    )


# --- generate, chat --------------------------------------------------------------------------------------------------


def test_generate_streams_and_counts(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = json_of(capsys, "generate", small, "--prompt", "Hello", "--raw", *GREEDY)
    assert (found["prompt_tokens"], found["new_tokens"] <= 8, found["peak_bytes"] > 0) == (5, True, True)
    assert main(["generate", str(small), "--prompt", "Hello", "--raw", *GREEDY]) == OK
    captured = capsys.readouterr()
    assert captured.out == found["text"] + "\n"
    assert "5 tokens read" in captured.err and "tokens/s" in captured.err


def test_prompts_from_files_and_pipes(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = json_of(capsys, "generate", small, "--prompt", "Grüße", *GREEDY)["text"]
    (tmp_path / "prompt.txt").write_text("Grüße", encoding="utf-8")
    assert json_of(capsys, "generate", small, "--prompt-file", tmp_path / "prompt.txt", *GREEDY)["text"] == said
    monkeypatch.setattr(sys, "stdin", io.StringIO("Grüße"))
    assert json_of(capsys, "generate", small, "--prompt", "-", *GREEDY)["text"] == said
    (tmp_path / "prompt.txt").write_bytes(b"Gr\xfc\xdfe")
    assert "is no text in UTF-8" in failure_of(capsys, "generate", small, "--prompt-file", tmp_path / "prompt.txt")


def test_quantising_on_the_fly_is_quantising(dense: Path, small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved = json_of(capsys, "generate", small, "--prompt", "Hello", *GREEDY)["text"]
    assert json_of(capsys, "generate", dense, "--format", "int4", "--prompt", "Hello", *GREEDY)["text"] == saved


def test_chat_through_a_pipe(small: Path, tmp_path: Path) -> None:
    script = f"Hello\n/save {tmp_path / 'chat.json'}\n/reset\nAgain\n/nonsense\n".encode() + b"Gr\xfc\xdfe\n"
    command = [sys.executable, "-m", "lowbit", "chat", str(small), "--threads", "1", *GREEDY]
    done = subprocess.run(command, input=script, capture_output=True, timeout=300, check=False)
    said, noted = done.stdout.decode(), done.stderr.decode()
    assert done.returncode == OK, noted
    first = json.loads((tmp_path / "chat.json").read_text(encoding="utf-8"))
    assert [message["role"] for message in first] == ["user", "assistant"]
    assert first[1]["content"] in said
    assert "there is no /nonsense" in noted and "Traceback" not in noted
    assert "this line is no text in UTF-8" in noted
    assert not said.startswith("> ")


# --- evaluate, bench -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("Call me Ishmael. Some years ago, never mind how long precisely. " * 6)
    return path


def test_evaluate_a_model_and_its_distance(
    dense: Path, small: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--text", text, "--window", "64"]
    plain = json_of(capsys, "evaluate", dense, *options)
    found = json_of(capsys, "evaluate", small, *options, "--against", dense)
    assert plain["perplexity"] > 1 and found["perplexity"] > 1
    assert found["against"]["perplexity"] == pytest.approx(plain["perplexity"], rel=1e-4)
    assert found["against"]["kl"] > 0 and 0 < found["against"]["top1"] <= 1
    same = json_of(capsys, "evaluate", dense, *options, "--against", dense)
    assert same["against"]["kl"] == pytest.approx(0, abs=1e-6) and same["against"]["top1"] == 1


def test_without_a_text_a_model_is_measured_on_the_one_that_comes_along(
    dense: Path, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--window", "64", "--windows", "3"]
    monkeypatch.chdir(tmp_path)
    Path("sqlite_valid").write_text("a file of that name is not what comes along")
    found = json_of(capsys, "evaluate", small, "--against", dense, *options)
    Path("sqlite_valid").unlink()
    assert (found["text"], found["windows"]) == ("sqlite_valid", 3) and found["against"]["kl"] > 0
    assert json_of(capsys, "evaluate", small, "--text", "sqlite_valid", *options)["perplexity"] == pytest.approx(
        found["perplexity"], rel=1e-4
    )
    assert json_of(capsys, "evaluate", small, "--text", "sqlite_train", *options)["perplexity"] != found["perplexity"]


def test_windows_fit_the_model(dense: Path, small: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options in ([], ["--against", dense], ["--engine", "transformers"]):
        assert json_of(capsys, "evaluate", small, "--text", text, *options)["window"] == 128
    assert main(["evaluate", str(small), "--text", str(text)]) == OK
    captured = capsys.readouterr()
    assert captured.err.count("windows of 128 tokens, not 512: the model reads no more at once") == 1
    assert "3 windows of 128" in captured.out
    for engine in ("lowbit", "transformers"):
        said = failure_of(capsys, "evaluate", small, "--text", text, "--window", "129", "--engine", engine)
        assert said.endswith("the model reads 128 tokens at once, less than --window 129: take 128 or fewer")


def test_evaluate_needs_a_text_with_a_window(
    small: Path, tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "absent.txt" in failure_of(capsys, "evaluate", small, "--text", tmp_path / "absent.txt")
    short = tmp_path / "short.txt"
    for content, sentence in (
        ("", f"{short} is empty"),
        ("a", "name a longer text"),
        ("Call me Ishmael.", "less than one window of 64: name a longer text, or --window 16"),
    ):
        short.write_text(content)
        assert sentence in failure_of(capsys, "evaluate", small, "--text", short, "--window", "64")
    said = failure_of(capsys, "evaluate", small, "--text", text, "--window", "64", "--windows", "99")
    assert "which make 6 windows of 64: leave --windows out, or take 6" in said


def test_bench_measures_what_was_asked(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = json_of(capsys, "bench", small, "--prompt-tokens", "7", "--new-tokens", "5", "--rounds", "2")
    assert (found["prompt_tokens"], found["new_tokens"], found["rounds"]) == (7, 5, 2)
    assert found["later_mean"] > 0 and found["later_p90"] <= found["later_p99"]
    assert found["load_seconds"] > 0 and found["peak_bytes"] > 0
    said = failure_of(capsys, "bench", small, "--prompt-tokens", "100", "--new-tokens", "29")
    assert said.endswith("prompt and answer have 129 tokens, and the model's context 128: ask for fewer of either")
    assert main(["bench", str(small), "--new-tokens", "4", "--rounds", "1"]) == OK
    text = capsys.readouterr().out
    assert all(word in text for word in ("load", "first token", "P90", "P99", "peak memory"))


# --- the real one ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_demo_goes_the_whole_way(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lowbit", "demo", "--max-new-tokens", "24"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == OK, done.stderr
    for word in (
        "SmolLM2-135M-Instruct",
        "bits per weight",
        "error",
        "saved in lowbit-demo",
        "fruits",
        "tokens/s",
        "peak memory",
    ):
        assert word in done.stdout
    assert [entry.name for entry in tmp_path.iterdir()] == ["lowbit-demo"]


@pytest.mark.slow
def test_ctrl_c_while_packing_leaves_nothing(tmp_path: Path) -> None:
    # The program interrupts itself when it is about to pack its twentieth weight.
    program = (
        "import os, signal, sys\n"
        "from lowbit.cli import main\n"
        "packed = 0\n"
        "def watch(frame, event, argument):\n"
        "    global packed\n"
        "    if event == 'call' and frame.f_code.co_name == 'pack_weight':\n"
        "        packed += 1\n"
        "        if packed == 20:\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.setprofile(watch)\n"
        "sys.exit(main(['demo']))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == INTERRUPTED
    assert done.stderr.splitlines()[-1] == "lowbit: stopped"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_gguf_file_is_a_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = json_of(capsys, "quantize", smollm2_gguf(), tmp_path / "out", "--format", "int4", "--rounder", "plain_rtn")
    assert found["bits_per_weight"] < 5
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= {
        f.name for f in (tmp_path / "out").iterdir()
    }
    words = ("generate", tmp_path / "out", "--prompt", "Hello", *GREEDY)
    assert json_of(capsys, *words, "--raw")["prompt_tokens"] < json_of(capsys, *words)["prompt_tokens"]


INTERRUPTED_WORK = """
import os, signal, sys
from lowbit.checkpoint import sites
from lowbit.cli import main

real, done = sites.pack_weight, []

def pack_weight(*arguments):
    done.append(1)
    if len(done) == 3:
        os.kill(os.getpid(), signal.SIGINT)
    return real(*arguments)

sites.pack_weight = pack_weight
signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever this run of the tests has inherited
sys.exit(main(sys.argv[1:]))
"""


def test_ctrl_c_while_quantising_leaves_nothing(dense: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", INTERRUPTED_WORK, "quantize", str(dense), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stdout) == (INTERRUPTED, "")
    assert done.stderr.endswith("\nlowbit: stopped\n") and "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []
