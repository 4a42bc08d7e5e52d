"""The code blocks of guide 2, Neural Compressor's transformers-like API, each as its users write it."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest
import torch
import transformers

import lowbit
from lowbit.cli import OK, main
from lowbit_assets import reference_model, text, tiny_model
from seeds.running import run_seed

LAYERS = 2
PROMPT = "Once upon a time, a little girl"
METHODS = {"rtn", "awq", "teq", "gptq", "autoround"}
READY = {"intel_extension_for_pytorch.optimize_transformers": "quantization_config="}
pytestmark = [pytest.mark.slow, pytest.mark.transformers]


@pytest.fixture(scope="module")
def model() -> Path:
    return reference_model("plain")


@pytest.fixture(scope="module")
def short(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first layers of the model: TEQ trains its scales for as many steps as it ever does, ten minutes for all 30."""
    folder = tmp_path_factory.mktemp("short") / "model"
    transformers.AutoModelForCausalLM.from_pretrained(model, num_hidden_layers=LAYERS).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(text("sqlite_valid")[:4000])
    return path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of random weights, for what does not depend on them."""
    return tiny_model("llama", tmp_path_factory.mktemp("tiny") / "model", max_position_embeddings=64)


def answer_of(folder: Path, **settings: int) -> str:
    """What transformers' own model of a folder answers, in full precision."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    found = transformers.AutoModelForCausalLM.from_pretrained(folder).generate(ids, do_sample=False, **settings)
    text: str = tokenizer.decode(found[0], skip_special_tokens=True)
    return text


@torch.no_grad()
def surprise(folder: Path, answer: str) -> float:
    """How unlikely the words after the prompt are to the model of a folder in full precision: nats for each token."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(answer, return_tensors="pt")["input_ids"]
    known = len(tokenizer(PROMPT)["input_ids"])
    likely = transformers.AutoModelForCausalLM.from_pretrained(folder)(ids).logits[0].log_softmax(-1)
    return -float(likely[known - 1 : -1].gather(1, ids[0, known:, None]).mean())


def test_five_algorithms(short: Path, calibration: Path, tmp_path: Path) -> None:
    (ran,) = run_seed("guide2/five_algorithms.py", tmp_path, short, calibration, rewritten=False)
    (answer,) = ast.literal_eval(ran.lines[0])
    # So few layers write no story, and their beams end in this or that repetition: TEQ's four bits find one that is as likely.
    assert answer.startswith(PROMPT) and len(answer) > len(PROMPT)
    assert surprise(short, answer) < surprise(short, answer_of(short, num_beams=4)) + 0.1
    found = json.loads(ran.lines[-1])
    original = found.pop("original")
    assert list(found) == ["rtn", "awq", "teq", "gptq", "autoround"]
    for name, row in found.items():
        assert row["method"] == name
        # The embedding, which is the head, stays as it is: 28 of the 35 million weights of so few layers.
        assert row["bytes"] < 0.9 * original, name
        # Rounding to nearest, which looks at no text, moves the word that these few layers would go on with.
        assert 0 < row["kl"] < 0.25 and (row["same"] or name == "rtn"), name
    assert max(found[name]["kl"] for name in ("awq", "teq", "gptq")) < found["rtn"]["kl"]


def test_five_algorithms_to_the_letter(tiny: Path, tmp_path: Path) -> None:
    """`AwqConfig(bits=4)` names a data set that only the hub has: lowbit's own text takes its place, and one warning says so."""
    (ran,) = run_seed("guide2/five_defaults.py", tmp_path, tiny, rewritten=False)
    assert 0 < int(ran.lines[-2]) <= 40
    assert ran.lines[-1] == "rtn awq teq gptq autoround"
    said = [line for line in ran.err.splitlines() if "pile-10k lies on the hub" in line]
    assert len(said) == 1 and "calibrated on lowbit's default text instead" in said[0]


def test_five_algorithms_by_their_names_of_today(tiny: Path, calibration: Path, tmp_path: Path) -> None:
    """The same script a second time would take a minute; on a tiny model every number is the same to the last digit."""
    for ran in run_seed("guide2/five_algorithms.py", tmp_path, tiny, calibration):
        assert {row["method"] for row in list(json.loads(ran.lines[-1]).values())[1:]} == METHODS


def test_save_and_load(model: Path, tmp_path: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    direct = lowbit.AutoModelForCausalLM.from_pretrained(model, quantization_config=lowbit.RtnConfig(bits=4))
    expected = direct.generate(ids, max_new_tokens=8, do_sample=False)
    for ran in run_seed("guide2/save_and_load.py", tmp_path, model, "saved"):
        assert ran.lines[-1] == "[True, True] True"
        assert (ran.folder / "saved" / "quantize_config.json").is_file()
        # Outside of the runner `import lowbit` is enough for plain transformers.
        again = transformers.AutoModelForCausalLM.from_pretrained(ran.folder / "saved")
        assert {row.kernel for row in lowbit.explain(again).rows} == {"core"}
        assert again.generate(ids, max_new_tokens=8, do_sample=False).tolist() == expected.tolist()


def test_on_a_gpu(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The three steps of the section for Intel GPUs, where "xpu" means the CPU."""
    for ran in run_seed("guide2/infer_on_gpu.py", tmp_path, model, left=READY):
        (answer,) = ast.literal_eval(ran.lines[-2])
        # Of the 100 tokens that are drawn each has its likelihood: 1.8 nats in the mean, the same words in disorder have 7.6.
        assert answer.startswith(PROMPT) and surprise(model, answer) < 3 and ran.lines[-1] == "torch.float16"

    saved = run_seed("guide2/save_on_gpu.py", tmp_path, model, "saved_dir")
    loaded = run_seed("guide2/load_on_gpu.py", tmp_path, model, "saved_dir", left=READY)
    for before, after in zip(saved, loaded, strict=True):
        (answer,) = ast.literal_eval(after.lines[-2])
        # The best of four beams has 1.2 nats, that of full precision 0.8; both know how stories go on.
        assert answer.startswith(f"{PROMPT} named") and surprise(model, answer) < 1.6
        size, method = after.lines[-1].split()
        assert method == "rtn" and int(size) <= int(before.lines[-1])

    # The script that comes with it, as `lowbit bench`; it takes the tokenizer from the folder of the model.
    folder = saved[0].folder / "saved_dir"
    transformers.AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    words = ["--woq", "--benchmark", "--model", str(folder), "--benchmark_iters", "1", "--max-new-tokens", "8"]
    capsys.readouterr()
    assert main(["bench", *words, "--num_warmup", "0"]) == OK
    lines = re.findall(r"^(\w[\w ]+): ([\d.]+) sec\.$", capsys.readouterr().out, re.MULTILINE)
    found = {name: float(value) for name, value in lines}
    assert found["Latency per token"] == pytest.approx(found["Inference latency"] / 8, abs=2e-5)
