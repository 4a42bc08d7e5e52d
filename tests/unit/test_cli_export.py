"""`lowbit export openvino`: what is written is compared with its source, and what cannot be is one sentence."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from safetensors.torch import load_file, save_file

import lowbit
from lowbit.cli import main
from lowbit.errors import LowbitError
from lowbit.openvino import comparison, verify, write_decoder
from lowbit.openvino.comparison import DEFAULT_LIMIT, Row, _Graph, _Question, _row, _truth, divergence, exact_settings
from lowbit.openvino.native.rows import Rows
from lowbit_assets import tiny_model, tiny_model_in_memory
from lowbit_assets.tiny import VOCABULARY, write_byte_tokenizer

PROMPT = [1, 50, 60, 70, 80]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_model("llama", tmp_path_factory.mktemp("plain"))
    write_byte_tokenizer(folder)
    return folder


def test_the_command_writes_and_compares(plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["export", "openvino", "--model", str(plain), "--int4", "--group-size", "32", "--ratio", "0.5"]
    assert main([*words, str(tmp_path / "out"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["formats"]) == {"int4_g32", "int8_channel"} and found["rounding"] > 0
    exact, default = found["verification"]
    assert exact["device"] == "CPU" and exact["setting"] == "exact" and exact["passed"]
    assert exact["difference"] < 1e-4 and exact["same"] == exact["tokens"] == 32
    assert default["setting"] == "default" and default["passed"]
    names = {"openvino_model.xml", "openvino_model.bin", "openvino_tokenizer.xml", "openvino_detokenizer.xml"}
    assert names | {"config.json", "tokenizer.json"} <= {file.name for file in (tmp_path / "out").iterdir()}
    assert main([*words, str(tmp_path / "out")]) == 1
    assert "--force" in capsys.readouterr().err
    assert main([*words, str(tmp_path / "out"), "--force", "--no-verify"]) == 0
    assert "divergence" not in capsys.readouterr().out


def test_a_low_bit_folder_keeps_its_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lowbit.optimize_model(tiny_model_in_memory("qwen3"), low_bit="int4_fine_g32").save_low_bit(tmp_path / "small")
    assert main(["export", "openvino", "--model", str(tmp_path / "small"), str(tmp_path / "out")]) == 0
    said = capsys.readouterr()
    assert "int4_fine_g32" in said.out and "as the source" in said.out and "FAILED" not in said.out
    assert "rounding" not in said.out and "no tokenizer" in said.err


def test_a_folder_that_answers_otherwise_is_found_out(plain: Path, tmp_path: Path) -> None:
    written = write_decoder(plain, tmp_path / "out", "int8")
    assert verify(written).passed
    other = write_decoder(tiny_model("llama", tmp_path / "other", seed=1), tmp_path / "other-out", "int8")
    assert not verify(dataclasses.replace(written, folder=other.folder)).passed
    (other.folder / "openvino_model.bin").unlink()
    broken = verify(dataclasses.replace(written, folder=other.folder))
    assert not broken.passed and "without its weights" in broken.rows[0].error


def test_a_guess_is_no_answer(plain: Path, tmp_path: Path) -> None:
    """Whatever the folder said first, the source's greedy answer is its own."""
    written = write_decoder(plain, tmp_path / "out", "int8", tokenizer=False, keep=True)
    assert written.kept is not None
    own = _truth(written, PROMPT, [])
    again = _truth(dataclasses.replace(written, kept=None), PROMPT, [])  # rounded once more
    assert again.tokens == own.tokens and np.array_equal(again.logits, own.logits)
    for wrong in (None, 0, 7, 30, 31):
        guess = [(token + (place == wrong)) % VOCABULARY for place, token in enumerate(own.tokens)]
        found = _truth(written, PROMPT, guess)
        assert found.tokens == own.tokens and found.gaps.shape == (32, VOCABULARY)
        np.testing.assert_allclose(found.gaps, own.gaps, rtol=0, atol=1e-5)
        np.testing.assert_allclose(found.logits, own.logits, rtol=0, atol=1e-5)


def test_what_is_chosen_behind_an_answer(plain: Path, tmp_path: Path) -> None:
    """At once and one by one: what a folder would have chosen by itself, as long as the answer is its own."""
    written = write_decoder(plain, tmp_path / "out", "int8", tokenizer=False, keep=True)
    known: Future[Any] = Future()
    own, settings = _truth(written, PROMPT, []), exact_settings("CPU")
    known.set_result(own)
    alone = _Question(written.folder, PROMPT, "CPU", "exact", settings, known).ask()
    behind = _Question(written.folder, PROMPT, "CPU", "default", settings, known).ask()
    assert alone.gaps is None and alone.tokens == behind.tokens == tuple(own.tokens)
    np.testing.assert_allclose(behind.gaps, own.gaps, rtol=0, atol=1e-4)
    # A folder that goes wrong behind the prompt alone: its divergence says so.
    gaps = np.array(behind.gaps)
    gaps[28] = np.roll(gaps[28], 1) * 50
    row = _row(dataclasses.replace(behind, gaps=gaps), own, 1e-3)
    assert row.divergence > DEFAULT_LIMIT and not row.passed and _row(behind, own, 1e-3).passed


def test_ctrl_c_ends_the_inference_that_runs(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The source is interrupted while the device reads the prompt: none of the 31 tokens behind it is waited for."""
    written = write_decoder(plain, tmp_path / "out", "int8", tokenizer=False, keep=True)
    reads, begun, cancelled = [], threading.Event(), threading.Event()
    read, cancel = _Graph.read, Rows.cancel

    def slow(graph: _Graph, tokens: Sequence[int]) -> Any:
        reads.append(len(tokens))
        begun.set()
        assert cancelled.wait(60)
        return read(graph, tokens)

    def interrupted(*_: Any) -> None:
        assert begun.wait(60)
        raise KeyboardInterrupt

    monkeypatch.setattr(_Graph, "read", slow)
    monkeypatch.setattr(Rows, "cancel", lambda rows: (cancelled.set(), cancel(rows)))
    monkeypatch.setattr(comparison, "_plain", interrupted)
    with pytest.raises(KeyboardInterrupt):
        verify(written)
    assert reads == [48]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("lowbit-verify")]


def test_an_inference_is_cancelled_from_another_thread(plain: Path, tmp_path: Path) -> None:
    graph = _Graph(write_decoder(plain, tmp_path / "out", tokenizer=False).folder, "CPU", {})
    timer = threading.Timer(0.05, graph.stop)
    timer.start()
    with pytest.raises(LowbitError, match=r"cancel|given up"):
        while True:
            graph.read([7] * 100)
    timer.join()


def test_a_rounding_that_fails_ends_the_export(tmp_path: Path) -> None:
    """It runs in a thread of its own, a weight ahead."""
    folder = tiny_model("llama", tmp_path / "plain")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(LowbitError, match="NaN or infinite"):
        write_decoder(folder, tmp_path / "out", "int4_g32")
    assert not (tmp_path / "out").exists() and "lowbit-ahead" not in " ".join(t.name for t in threading.enumerate())


def test_what_counts_as_the_same() -> None:
    logits = np.random.default_rng(0).standard_normal((5, 40)).astype(np.float32)
    assert divergence(logits, logits) == 0 and divergence(logits, logits + 3) < 1e-9 < divergence(logits, 2 * logits)
    row = Row("CPU", "exact", 1e-5, 0, same=32, tokens=32)
    assert row.passed and not dataclasses.replace(row, same=3).passed
    assert dataclasses.replace(row, same=3, tie=True).passed and not dataclasses.replace(row, difference=0.1).passed
    assert not dataclasses.replace(row, setting="default", difference=float("nan")).passed
    assert not dataclasses.replace(row, setting="default", divergence=1.0).passed


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--int4", "--device", "NPU.3"], "there is no device 'NPU.3' here: OpenVINO 2026"),
        (["--group-size", "32"], "belong to a format"),
        (["--int8", "--ratio", "0.5"], "share of weights"),
        (["--format", "int9"], "int9"),
    ],
)
def test_what_cannot_be_is_one_sentence(
    words: list[str], sentence: str, plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", "openvino", "--model", str(plain), *words, str(tmp_path / "out")]) == 1
    said = capsys.readouterr()
    assert sentence in said.err and said.err.count("\n") == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "words", [["export", "openvino", "--int4", "out", "--model"], ["quantize", "out"], ["inspect"]]
)
def test_a_folder_of_openvino_is_no_source(
    words: list[str], plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its .bin files are no pickles, which nobody should be told to allow."""
    monkeypatch.chdir(tmp_path)
    written = write_decoder(plain, tmp_path / "graph", tokenizer=False).folder
    words = [*words[:1], str(written), *words[1:]] if words[0] == "quantize" else [*words, str(written)]
    assert main(words) == 1
    said = capsys.readouterr().err
    assert "holds a graph of OpenVINO's" in said and "pickle" not in said and said.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["graph"]


@pytest.mark.parametrize("out", ["", "."])
def test_the_folder_that_one_stands_in_is_no_mount_point(
    out: str, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.txt").write_text("mine")
    assert main(["export", "openvino", "--model", str(plain), "--int4", out]) == 1
    assert ". is not empty, and what it holds is no model" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    ("kind", "words", "share"),
    [
        ("arcee", ["--format", "none"], 1.1),
        ("arcee", ["--int8"], 0.4),
        ("persimmon", ["--int4", "--group-size", "32"], 0.25),
    ],
)
def test_a_family_without_a_spec_is_followed(
    kind: str, words: list[str], share: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 131, "head_dim": 16}
    heads = {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    config = transformers.AutoConfig.for_model(kind, **sizes, **heads, max_position_embeddings=96)
    transformers.set_seed(1)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "odd")
    assert main(["export", "openvino", "--model", str(tmp_path / "odd"), *words, str(tmp_path / "out")]) == 0
    said = capsys.readouterr()
    assert f"no spec of models of type {kind!r}: the graph is that of a call" in said.err
    assert "FAILED" not in said.out and said.out.count("as the source") == 2
    files = [tmp_path / "out" / "openvino_model.bin", tmp_path / "odd" / "model.safetensors"]
    assert files[0].stat().st_size < share * files[1].stat().st_size
    with pytest.raises(LowbitError, match="compress_weights"):
        write_decoder(tmp_path / "odd", tmp_path / "other", "int4", ratio=0.5)


def test_without_the_package_there_is_a_line_that_installs_it(plain: Path, tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['openvino'] = None\n"
        "from lowbit.cli import main\n"
        f"sys.exit(main(['export', 'openvino', '--model', {str(plain)!r}, '--int4', {str(tmp_path / 'out')!r}]))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 1 and result.stderr.count("\n") == 1
    assert "needs the package 'openvino'" in result.stderr and "pip install 'lowbit[openvino]'" in result.stderr
