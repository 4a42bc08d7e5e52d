"""Folders of every class are compared with their source, through optimum-cli too: a folder that answers otherwise is found out."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import lowbit
from lowbit import openvino
from lowbit.compat import optimum_export
from lowbit.errors import LowbitError
from lowbit.openvino.class_comparison import _row, _Said, verify_class
from lowbit.openvino.comparison import Row, Verification, rounding_of, told
from lowbit.openvino.export import write_decoder
from lowbit_assets import tiny_model

# Following a module takes torch seconds.
pytestmark = [pytest.mark.slow, pytest.mark.transformers]
SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
}
T5 = {"vocab_size": 96, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 1, "num_heads": 4}


def saved(model: Any, folder: Path) -> Path:
    model.eval().save_pretrained(folder)
    return folder


def bert(folder: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    return saved(transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES)), folder)


def t5(folder: Path) -> Path:
    torch.manual_seed(0)
    config = transformers.T5Config(**T5, decoder_start_token_id=0, eos_token_id=None)
    return saved(transformers.T5ForConditionalGeneration(config), folder)


def whisper(folder: Path) -> Path:
    torch.manual_seed(0)
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "vocab_size": 96}
    more = {"decoder_attention_heads": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "num_mel_bins": 16}
    places = {"max_source_positions": 50, "max_target_positions": 64, "decoder_start_token_id": 1}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = transformers.WhisperConfig(**sizes, **more, **places, **ids, suppress_tokens=[], begin_suppress_tokens=[])
    return saved(transformers.WhisperForConditionalGeneration(config), folder)


def exported(source: Path, out: Path, *words: str) -> int:
    return optimum_export.run(["export", "openvino", "-m", str(source), *words, str(out)])


@pytest.mark.parametrize(
    ("make", "words"),
    [(bert, ""), (bert, "--int4 --group-size 32 --all-layers"), (t5, ""), (t5, "--int8"), (whisper, "")],
)
def test_every_class_is_compared(make: Any, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert exported(make(tmp_path / "source"), tmp_path / "out", *words.split()) == 0
    said = capsys.readouterr().out.splitlines()
    place = said.index("against the source:")
    first, second = said[place + 1 :]
    if words:  # what nobody can say exactly is not said
        assert first.startswith("  CPU, default: as the source") and second.startswith("  the rounding itself moves")
    else:
        assert first.startswith("  CPU, exact: as the source") and second.startswith("  CPU, default: as the source")
        assert bool(re.search(r" (3[23]) of \1 tokens alike", first)) == (make is not bert)


@pytest.mark.parametrize(
    ("words", "rounding"),
    [
        ("--weight-format fp32", False),
        ("--int8", True),
        ("--int4 --group-size 32 --all-layers --backup-precision int8_sym", True),
    ],
)
def test_a_language_model_is_compared(
    words: str, rounding: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tiny_model("llama", tmp_path / "source")
    assert exported(source, tmp_path / "out", *words.split()) == 0
    said = capsys.readouterr().out
    assert said.count(": as the source; ") == 2 and "CPU, exact: as the source" in said
    assert "32 of 32 tokens alike" in said and ("the rounding itself" in said) == rounding
    assert exported(source, tmp_path / "silent", *words.split(), "--no-verify") == 0
    assert "against the source" not in capsys.readouterr().out


def test_a_folder_that_answers_otherwise_is_found_out(tmp_path: Path) -> None:
    kind = openvino.OVModelForSequenceClassification
    kind.from_pretrained(bert(tmp_path / "one"), export=True).save_pretrained(tmp_path / "out")
    assert verify_class(kind, tmp_path / "out", tmp_path / "one", {}).passed
    found = verify_class(kind, tmp_path / "out", bert(tmp_path / "other", seed=1), {})
    assert not found.passed and "FAILED" in told(found)[0]
    (tmp_path / "out" / "openvino_model.bin").unlink()
    broken = verify_class(kind, tmp_path / "out", tmp_path / "one", {})
    assert not broken.passed and "without its weights" in told(broken)[0]


def test_codes_of_a_low_bit_module_are_compared_within_what_it_rounds(tmp_path: Path) -> None:
    module = transformers.AutoModelForSequenceClassification.from_pretrained(bert(tmp_path / "plain"))
    lowbit.optimize_model(module, "int4_g32").save_low_bit(tmp_path / "low")
    kind = openvino.OVModelForSequenceClassification
    kind.from_pretrained(tmp_path / "low", export=True).save_pretrained(tmp_path / "out")
    found = verify_class(kind, tmp_path / "out", tmp_path / "low", {})
    assert found.passed and found.rounding is None and found.rows[0].difference > 0


def test_codes_of_a_plain_model_are_a_rounding(tmp_path: Path) -> None:
    """AWQ rounds the module of torch, so that its graph comes with codes and no record of compress_weights."""
    kind, source = openvino.OVModelForMaskedLM, tmp_path / "source"
    torch.manual_seed(0)
    saved(transformers.BertForMaskedLM(transformers.BertConfig(**SIZES)), source)
    asked = {"bits": 4, "group_size": 32, "quant_method": "awq", "dataset": torch.randint(3, 96, (4, 16))}
    kind.from_pretrained(source, export=True, quantization_config=asked).save_pretrained(tmp_path / "out")
    found = verify_class(kind, tmp_path / "out", source, {})
    assert found.passed and found.rounding is not None and found.rounding > 0


def test_both_ends_of_an_answer_are_compared(tmp_path: Path) -> None:
    kind, source = openvino.OVModelForQuestionAnswering, tmp_path / "source"
    torch.manual_seed(0)
    model = transformers.BertForQuestionAnswering(transformers.BertConfig(**SIZES))
    saved(model, source)
    kind.from_pretrained(source, export=True).save_pretrained(tmp_path / "out")
    assert verify_class(kind, tmp_path / "out", source, {}).passed
    with torch.no_grad():
        model.qa_outputs.weight[1] *= -1
    assert not verify_class(kind, tmp_path / "out", saved(model, tmp_path / "other"), {}).passed


def test_an_even_choice_of_tokens_is_a_tie() -> None:
    """The third token is chosen between 5 and 2; the fourth is not even; no row of logits chose the first one."""
    logits = np.zeros((1, 4, 8), np.float32)
    logits[0, [0, 1, 2, 3], [3, 5, 1, 4]] = 10
    logits[0, 1, 2] = 9.99

    def said(*tokens: int, name: str = "logits") -> _Said:
        return _Said(name, logits, tokens, 0.0)

    truth = said(0, 3, 5, 1)
    assert _row("CPU", "exact", truth, said(0, 3, 2, 7), 1e-3).tie
    for other in (said(0, 3, 4, 1), said(0, 3, 5, 2), said(2, 3, 5, 1), said(0, 3, 5)):
        assert not _row("CPU", "exact", truth, other, 1e-3).passed
    behind = said(3, 2, 1, 4)  # its first tokens are not among those that it made
    assert not _row("CPU", "exact", behind, said(3, 5, 1, 4), 1e-3).tie
    assert not _row("CPU", "exact", said(0, 3, 5, 1, name="sums"), said(0, 3, 2, 7), 1e-3).tie


def test_a_rounded_folder_that_does_not_run_is_found_out(tmp_path: Path) -> None:
    written = write_decoder(tiny_model("llama", tmp_path / "source"), tmp_path / "out")
    assert rounding_of(written) == pytest.approx(0, abs=1e-4)
    (tmp_path / "out" / "openvino_model.bin").unlink()
    with pytest.raises(LowbitError, match=r"^the graph that was rounded does not run on CPU: .* without its weights"):
        rounding_of(written)
    assert not Verification((), float("nan")).passed and Verification((), 0.1).passed


def test_lines_say_what_rows_do() -> None:
    rows = (Row("CPU", "exact", 1e-5, 0.0, 3, 32, tie=True), Row("GPU", "default", error="it is busy"))
    assert told(Verification(rows, 0.25)) == [
        "CPU, exact: as the source; 1.0e-05 away, divergence 0.00000, 3 of 32 tokens alike (a tie)",
        "GPU, default: FAILED: it is busy",
        "the rounding itself moves answers by a divergence of 0.2500",
    ]
