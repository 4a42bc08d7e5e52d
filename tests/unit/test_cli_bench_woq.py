"""`lowbit bench --woq --benchmark --model`: the options of Neural Compressor's script, and figures that are right."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from lowbit.bench import AnswerTimings, measure_answers
from lowbit.cli import COMMANDS, OK, USAGE, bench, command_parser, main
from lowbit.cli.bench_woq import ROWS, config_from
from lowbit.configs.classes import saved_config
from lowbit.errors import RecipeError
from lowbit_assets import tiny_model

SHORT = ["--prompt-tokens", "6", "--benchmark_iters", "2", "--num_warmup", "1", "--max-new-tokens", "4"]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("llama", tmp_path_factory.mktemp("dense") / "llama", intermediate_size=192)


def asked(*words: str) -> Any:
    return command_parser("bench", bench).parse_args(["--model", "m", *words])


def test_figures_are_means_of_the_answers_that_count() -> None:
    taken = iter([(100.0, 100.0), (100.0, 100.0), (0.5, 2.0), (1.5, 4.0)])
    called: list[int] = []

    def answer(new_tokens: int) -> tuple[float, float]:
        called.append(new_tokens)
        return next(taken)

    found = measure_answers(answer, AnswerTimings(3, 10, 5, ()), rounds=2, warmup=2)
    assert called == [5] * 4 and found.seconds == (2.0, 4.0) and found.first_seconds == (0.5, 1.5)
    assert found.latency == 3.0 and found.latency_per_token == pytest.approx(0.6)
    assert found.tokens_per_second == pytest.approx(3 * 5 / 3.0) and found.answers_per_second == pytest.approx(1.0)
    assert found.first_token == 1.0 and found.later_token == pytest.approx((3.0 - 1.0) / 4)
    plain = measure_answers(lambda _: (None, 2.0), AnswerTimings(1, 10, 1, ()), rounds=3, warmup=0)
    assert (plain.latency, plain.first_token, plain.later_token) == (2.0, None, None)
    assert plain.to_dict()["tokens_per_second"] == 0.5


def test_every_option_of_that_script_is_taken() -> None:
    words = {name for action in command_parser("bench", bench)._actions for name in action.option_strings}
    assert {f"--{row.name}" for row in ROWS} <= words and "--device" in words and "--model" in words
    assert asked("--load_in_4bit", "True", "--use_layer_wise").use_layer_wise is True
    assert asked("--load_in_4bit", "no").load_in_4bit is False
    assert asked("--trust_remote_code").trust_remote_code and asked("--trust-remote-code").trust_remote_code
    assert command_parser("bench", bench).parse_args(["m"]).model == asked().model == "m"


def test_the_configuration_that_options_describe() -> None:
    config: Any = config_from(asked("--woq", "--bits", "8", "--group_size", "64", "--compute_dtype", "fp16"))
    assert (type(config).__name__, config.bits, config.group_size, config.sym) == ("RtnConfig", 8, 64, True)
    words = [
        "--woq_algo",
        "GPTQ",
        "--scheme",
        "asym",
        "--damp_percent",
        "0.01",
        "--n_samples",
        "4",
        "--dataset",
        "a.txt",
    ]
    config = config_from(asked("--woq", *words))
    assert (config.damp_percent, config.n_samples, config.sym, config.dataset) == (0.01, 4, False, "a.txt")
    config = config_from(asked("--woq", "--woq_algo", "AutoRound", "--autoround_iters", "7", "--lr", "0.01"))
    assert (config.iters, config.lr, config.sym) == (7, 0.01, True)
    assert config_from(asked("--woq", "--woq_algo", "Awq")).to_dict()["zero_point"] is False  # type: ignore[attr-defined]
    with pytest.warns(UserWarning, match="RtnConfig: what changes nothing here is ignored: n_samples"):
        config_from(asked("--woq", "--n_samples", "4"))
    with pytest.raises(RecipeError, match=r"--bits 3\.5 of --woq is a whole number"):
        config_from(asked("--woq", "--bits", "3.5"))


@pytest.mark.transformers
def test_a_model_is_quantised_saved_and_timed(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "saved"
    words = ["bench", "--woq", "--benchmark", "--model", str(dense), "--output_dir", str(out), *SHORT]
    assert main([*words, "--group_size", "64", "--profile_token_latency"]) == OK
    text = capsys.readouterr().out
    assert "---- Prompt size: 6" in text and text.count("Iteration: ") == 3
    found = {name: float(value) for name, value in re.findall(r"^(\w[\w .]+): ([\d.]+) sec\.$", text, re.MULTILINE)}
    latency, per_token = found["Inference latency"], found["Latency per token"]
    assert per_token == pytest.approx(latency / 4, abs=2e-5)
    assert found["First token average latency"] + 3 * found["Average 2... latency"] == pytest.approx(latency, abs=1e-4)
    speeds = re.search(r"Average throughput: ([\d.]+) samples/sec, ([\d.]+) tokens/sec", text)
    assert speeds is not None and float(speeds[2]) == pytest.approx(4 * float(speeds[1]), rel=0.01)
    config = saved_config(out)
    assert config is not None and config.to_dict()["group_size"] == 64 and (out / "tokenizer.json").is_file()

    # The guide's command: what is low-bit already is taken as it is.
    words = ["bench", "--woq", "--benchmark", "--model", str(out), "--num_beams", "2", "--benchmark_batch_size", "3"]
    assert main([*words, *SHORT, "--profile_token_latency", "--json"]) == OK
    printed = capsys.readouterr()
    timed = json.loads(printed.out)
    assert "low-bit already and is loaded as it is" in printed.err
    assert (timed["batch"], timed["new_tokens"], len(timed["seconds"])) == (3, 4, 2)
    assert timed["tokens_per_second"] == pytest.approx(3 * 4 / timed["latency"])
    firsts = timed["first_seconds"]
    assert len(firsts) == 2 and all(0 < first < whole for first, whole in zip(firsts, timed["seconds"], strict=True))


@pytest.mark.transformers
def test_low_bit_by_a_flag(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bench", str(dense), "--load_in_8bit", "True", "--output_dir", str(tmp_path / "eight")]
    assert main(words) == OK
    assert "saved: " in capsys.readouterr().out
    assert '"num_bits": 8' in (tmp_path / "eight" / "config.json").read_text()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--accuracy"], "--accuracy needs the tasks of lm-eval"),
        (["--woq"], "nothing is timed and nothing saved: add --benchmark, or --output_dir"),
        (["--woq", "--benchmark", "--bits", "2.5"], "is a whole number: name 4 or 8"),
    ],
)
def test_what_leads_nowhere_is_said_first(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--model", "nowhere", *words]) == 1
    assert said in capsys.readouterr().err


def test_a_model_must_be_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--woq", "--benchmark"]) == USAGE
    assert capsys.readouterr().err == "lowbit: error: which MODEL? (see 'lowbit bench --help')\n"
    assert "bench" in COMMANDS
