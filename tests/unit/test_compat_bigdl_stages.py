"""Of bigdl.llm and ipex_llm: stages, experts apart, answers in JSON, llama.cpp's iq types, and what slips are told."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from lowbit.compat.ignored import CompatWarning
from lowbit.compat.missing import UnknownNameError
from lowbit.errors import LowbitError, RecipeError
from lowbit_assets import reference_model
from unit.checkpoint_cases import logits
from unit.test_compat_bigdl import PROMPT, dense, formats, load, old, old_names, write_importance

__all__ = ["dense", "old_names"]  # fixtures
pytestmark = pytest.mark.transformers

STAGES = """\
import sys
import torch
from ipex_llm.transformers import AutoModelForCausalLM, init_pipeline_parallel

init_pipeline_parallel()
rank, stages = torch.distributed.get_rank(), int(sys.argv[2])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], load_in_4bit=True, pipeline_parallel_stages=stages)
ids = torch.tensor([[5, 9, 11, 4, 8]]).to(f"xpu:{rank}")
print(torch.distributed.get_world_size(), *model.generate(ids, max_new_tokens=4, do_sample=False)[0].tolist())
"""


def run_stages(dense: Path, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    (folder / "stages.py").write_text(STAGES)
    return subprocess.run(
        [sys.executable, "-m", "lowbit.compat", "stages.py", str(dense), "2"],
        cwd=folder, env={**os.environ, "LOWBIT_XPU": "cpu", **variables}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


def test_one_process_is_one_stage(dense: Path, tmp_path: Path) -> None:
    """A script for two stages, started in one process: the same tokens as without stages."""
    assert "init_pipeline_parallel" in STAGES
    ran = run_stages(dense, tmp_path)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert "pipeline_parallel_stages=2 has no effect: one process runs the whole model" in ran.stderr
    model = load(dense, load_in_4bit=True)
    expected = model.pipeline_parallel_generate(torch.tensor([[5, 9, 11, 4, 8]]), max_new_tokens=4, do_sample=False)
    assert ran.stdout.split() == ["1", *map(str, expected[0].tolist())]
    model.save_low_bit(tmp_path / "low")
    with pytest.warns(CompatWarning, match="pipeline_parallel_stages=3 has no effect"):
        again = old("transformers").AutoModelForCausalLM.load_low_bit(tmp_path / "low", pipeline_parallel_stages=3)
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("variable", ["WORLD_SIZE", "PMI_SIZE"])
def test_several_processes_are_refused(variable: str, dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "2")
    for ask in (
        old("transformers").init_pipeline_parallel,
        lambda: load(dense, load_in_4bit=True, pipeline_parallel_stages=2),
    ):
        with pytest.raises(RecipeError, match=f"{variable}=2: .* start the script without its launcher"):
            ask()


def test_what_is_left_is_refused() -> None:
    with pytest.raises(UnknownNameError, match="lowbit chat"):
        _ = old("transformers.pipeline_parallel").PPModelWorker


def test_experts_stay_where_the_model_is(dense: Path) -> None:
    model = load(dense, load_in_4bit=True)
    with pytest.warns(CompatWarning, match="a model runs on one device"):
        assert old("transformers").convert_model_hybrid(model) is model
    assert old("transformers.convert").convert_model_hybrid is old("transformers").convert_model_hybrid


def test_guesses_that_nobody_makes(dense: Path) -> None:
    for model in (load(dense, load_in_4bit=True), load(dense)):
        with pytest.raises(LowbitError, match=r"speculative=True\), or pass draft_model="):
            model.speculative_generate(PROMPT)
    found = model.lookup_generate(PROMPT, max_new_tokens=8, num_output_tokens=3, do_sample=False)
    assert torch.equal(found, model.generate(PROMPT, max_new_tokens=8, do_sample=False))


def test_slips_that_are_told_what_to_do(dense: Path) -> None:
    model = load(dense, load_in_4bit=True)
    for given, said in (("hello", "not a text: model.generate"), ([3, 4], r"not a list: .* return_tensors='pt'")):
        with pytest.raises(LowbitError, match=said):
            model.generate(given)
    for folder in (None, ""):
        with pytest.raises(LowbitError, match="name the folder to save the model in"):
            model.save_low_bit(folder)
    if not torch.xpu.is_available():
        with pytest.raises(
            LowbitError, match=r"no xpu device here: use device_map='cpu', LOWBIT_XPU=cpu \(or cuda\) under"
        ):
            load(dense, load_in_4bit=True, device_map="xpu")


def test_answers_in_json() -> None:
    """The reference model, which would write prose, writes what a schema says."""
    faces = old("transformers.xgrammar")
    folder = reference_model("plain")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    try:
        import xgrammar  # type: ignore[import-not-found]  # noqa: F401
    except ModuleNotFoundError:
        with pytest.raises(LowbitError, match="pip install xgrammar"):
            faces.create_json_logits_processor(tokenizer, 100)
        return
    model = load(folder, load_in_low_bit="sym_int8")
    schema = {
        "type": "object",
        "properties": {"age": {"type": "integer"}},
        "required": ["age"],
        "additionalProperties": False,
    }
    processor = faces.create_json_logits_processor(tokenizer, model.config.vocab_size, schema)
    ids = tokenizer("Tom is 7 years old. His age as JSON: ", return_tensors="pt")["input_ids"]
    texts = []
    for _ in range(2):
        out = model.generate(ids, max_new_tokens=24, do_sample=False, logits_processor=[processor])
        texts.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
        faces.reset_json_logits_processor(processor)
    assert texts[0] == texts[1] and list(json.loads(texts[0])) == ["age"]


def test_an_iq_type_with_its_importance_matrix(dense: Path, tmp_path: Path) -> None:
    """Blocks of 256 of q2_k stand in, in rows that they divide; the folder is read again."""
    asked = {"load_in_low_bit": "gguf_iq2_xxs", "torch_dtype": torch.float32}
    with pytest.warns(UserWarning, match="q2_k stands in for it, 2.62 bits a weight instead of 2.06"):
        plain = load(dense, **asked)
    with pytest.warns(UserWarning, match="q2_k stands in"):
        weighed = load(dense, imatrix=str(write_importance(tmp_path / "imatrix.dat")), **asked)
    found = formats(plain)
    assert {found[f"model.layers.0.{name}"] for name in ("mlp.up_proj", "self_attn.q_proj")} == {"int2_asym_g16"}
    assert (
        found["model.layers.0.self_attn.v_proj"] == "int4_asym_g32" and found["model.embed_tokens"] == "int2_asym_g16"
    )
    assert not torch.equal(weighed.model.layers[0].mlp.up_proj.weight, plain.model.layers[0].mlp.up_proj.weight)
    plain.save_low_bit(tmp_path / "low")
    again = old("transformers").AutoModelForCausalLM.load_low_bit(tmp_path / "low")
    assert torch.equal(logits(again), logits(plain)) and formats(again) == found
