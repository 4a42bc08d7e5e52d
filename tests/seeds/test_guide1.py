"""Every code block of BigDL-LLM's guide for Intel GPUs, run as a script of its own by the runner, on the SmolLM2 model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers

import lowbit
from lowbit_assets import reference_model
from seeds.running import run_seed

pytestmark = [pytest.mark.slow, pytest.mark.transformers]
PROMPT = "Q: What is CPU?\nA:"


@pytest.fixture(scope="module")
def model() -> Path:
    return reference_model("plain")


@pytest.fixture(scope="module")
def expected(model: Path) -> str:
    """The text of lowbit's own call for the same."""
    made = lowbit.AutoModelForCausalLM.from_pretrained(model, load_in_4bit=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    ids = tokenizer.encode(PROMPT, return_tensors="pt")
    return repr(tokenizer.decode(made.generate(ids, max_new_tokens=32, do_sample=False)[0], skip_special_tokens=True))


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def test_the_extension_is_imported(tmp_path: Path) -> None:
    left = {"intel_extension_for_pytorch.__name__": "no name of its own"}
    (old, new) = run_seed("guide1/import_extension.py", tmp_path, left=left)
    assert old.lines == new.lines and old.lines[0].endswith("intel_extension_for_pytorch")


def test_optimize_save_and_load(model: Path, expected: str, tmp_path: Path) -> None:
    for ran in run_seed("guide1/optimize_model.py", tmp_path, model, "low"):
        assert "device cpu" in ran.lines
        before, after = map(int, ran.lines[-1].split()[1:])
        assert after < before / 3
        assert size(ran.folder / "low") < size(model) / 2
        assert not list((ran.folder / "low").glob("*.bin"))
    for loaded in run_seed("guide1/load_optimized.py", tmp_path, "low"):
        assert loaded.lines[-1] == expected


def test_run_optimized(model: Path, expected: str, tmp_path: Path) -> None:
    for ran in run_seed("guide1/run_optimized.py", tmp_path, model):
        assert ran.lines[-1] == expected


def test_load_in_4bit_and_load_low_bit(model: Path, expected: str, tmp_path: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    ids = tokenizer.encode(PROMPT, return_tensors="pt")
    with torch.no_grad():
        dense = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)(ids).logits
    for ran in run_seed("guide1/load_in_4bit.py", tmp_path, model, "low"):
        assert ran.lines[-1] == "device cpu"
        assert size(ran.folder / "low") < size(model) / 2
        with torch.no_grad():
            low = transformers.AutoModelForCausalLM.from_pretrained(ran.folder / "low")(ids).logits.float()
        assert torch.nn.functional.cosine_similarity(dense, low, dim=-1).mean() > 0.9
        assert (dense.argmax(-1) == low.argmax(-1)).float().mean() > 0.6
    for ran in run_seed("guide1/load_low_bit.py", tmp_path, "low"):
        assert ran.lines[-2:] == ["device cpu", expected]


PREPARES = {"ipex_llm.transformers.qlora.prepare_model_for_kbit_training": "no name of its own"}


def test_qlora_load_and_prepare(model: Path, tmp_path: Path) -> None:
    for ran in run_seed("guide1/qlora_load.py", tmp_path, model):
        assert ran.lines[-2:] == ["['Linear', 'LowBitLinear']", "nf4 torch.float16 cpu"]
    (ran,) = run_seed(
        "guide1/qlora_prepare.py", tmp_path, model, rewritten=False
    )  # the next test begins with these lines
    assert ran.lines[-2:] == ["learning 0", "checkpointing True"]


def test_qlora_finetuning(model: Path, tmp_path: Path) -> None:
    for ran in run_seed("guide1/qlora_finetune.py", tmp_path, model, "adapter", left=PREPARES):
        losses = [float(loss) for loss in ran.lines[-1].split()[1:]]
        assert len(losses) == 6 and losses[-1] < losses[0]
        fields = json.loads((ran.folder / "adapter" / "adapter_config.json").read_text())
        assert fields["target_modules"] and (ran.folder / "adapter" / "adapter_model.safetensors").is_file()
