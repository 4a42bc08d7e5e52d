"""A run that was ended, by a kill, by Ctrl-C or by the disk, goes on where it stopped; another run does not."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import lowbit
from lowbit.blockwise import Where
from lowbit.blockwise.rounding import BlockRounding
from lowbit.calibration import Calibration
from lowbit.cli import FAILED, INTERRUPTED, OK, main
from lowbit.errors import CheckpointError, RecipeError, one_line
from lowbit.options import AutoRoundOptions, AwqOptions, GptqOptions
from lowbit.quantize import quantize_
from lowbit.recipe import Recipe, recipe_named
from lowbit_assets import text, tiny_model, tiny_model_in_memory

IDS = torch.randint(3, 280, (8, 32), generator=torch.Generator().manual_seed(0))
HELD_OUT = torch.randint(3, 280, (4, 32), generator=torch.Generator().manual_seed(1))
CALIBRATION = Calibration(IDS)
INT3 = recipe_named("int3_g32").replace(head=None)
GPTQ = INT3.replace(rounder="gptq")


def logits_of(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(HELD_OUT).logits


@pytest.mark.transformers
def test_a_resumed_run_from_a_folder_keeps_what_scalers_did(tmp_path: Path) -> None:
    tiny_model_in_memory("llama").save_pretrained(tmp_path / "dense")
    recipe = INT3.replace(scaler="awq", scaler_options=AwqOptions(steps=4))
    given = {"recipe": recipe, "calibration": IDS, "resume": tmp_path / "run"}
    models = [lowbit.AutoModelForCausalLM.from_pretrained(tmp_path / "dense", **given) for _ in range(2)]
    assert torch.equal(logits_of(models[0]), logits_of(models[1]))


class Killed(Exception):
    pass


UNCORRECTED = GPTQ.replace(rounder_options=GptqOptions(correction=0.0))
TUNED = INT3.replace(rounder="autoround", rounder_options=AutoRoundOptions(iterations=4))
SCALED = GPTQ.replace(scaler="awq", scaler_options=AwqOptions(steps=2))


@pytest.mark.parametrize(
    ("family", "recipe"),
    [
        *(("llama", recipe) for recipe in (GPTQ, UNCORRECTED, TUNED, SCALED)),
        *(("qwen3_moe", recipe) for recipe in (GPTQ, UNCORRECTED)),
    ],
)
def test_a_killed_run_goes_on_where_it_stopped(family: str, recipe: Recipe, tmp_path: Path) -> None:
    folder = tmp_path / "unfinished"
    whole = tiny_model_in_memory(family)
    report = quantize_(whole, recipe, calibration=CALIBRATION)
    seen: list[str] = []

    def kill_in_second(module: nn.Module, *_: object) -> None:
        seen.append("second")
        if len(seen) > 6:
            raise Killed

    model = tiny_model_in_memory(family)
    model.model.layers[1].register_forward_pre_hook(kill_in_second)
    with pytest.raises(Killed):
        quantize_(model, recipe, calibration=CALIBRATION, where=Where(folder))
    resumed, runs = tiny_model_in_memory(family), []
    resumed.model.layers[0].self_attn.o_proj.register_forward_pre_hook(lambda *_: runs.append(0))
    found = quantize_(resumed, recipe, calibration=CALIBRATION, where=Where(folder))
    assert torch.equal(logits_of(resumed), logits_of(whole))
    assert [(r.path, r.error, r.note) for r in found.layers] == [(r.path, r.error, r.note) for r in report.layers]
    assert len(runs) <= 4, "the first block ran only to find the blocks and what they get, not to be rounded"


def test_another_recipe_text_or_model_is_not_resumed(tmp_path: Path) -> None:
    quantize_(tiny_model_in_memory("llama"), GPTQ, calibration=CALIBRATION, where=Where(tmp_path / "run"))
    with pytest.raises(RecipeError, match=r'begun with the recipe int3_g32 \(.*"int3_g32".*resumed with int4 .*"int4"'):
        other = GPTQ.replace(linear=recipe_named("int4").linear, name="int4")
        quantize_(tiny_model_in_memory("llama"), other, calibration=CALIBRATION, where=Where(tmp_path / "run"))
    # In the one line of the command line both are named, however much a recipe says, and of options those that differ.
    full = recipe_named("int4").replace(rounder="gptq", rounder_options=GptqOptions(damping=0.05, block_columns=64))
    for other in (full, GPTQ.replace(rounder_options=GptqOptions(damping=0.05))):
        with pytest.raises(RecipeError) as refused:
            quantize_(tiny_model_in_memory("llama"), other, calibration=CALIBRATION, where=Where(tmp_path / "run"))
        said = one_line(str(refused.value))
        assert (
            "begun with the recipe int3_g32 (" in said and f"resumed with {other.name or other.linear.name} (" in said
        )
        assert said.endswith("use the first recipe again")
    assert '{"damping": 0.01}' in said and '{"damping": 0.05}' in said
    with pytest.raises(RecipeError, match=r"calibration tokens, 8 x 32 .* with tokens, 4 x 32"):
        quantize_(tiny_model_in_memory("llama"), GPTQ, calibration=Calibration(IDS[:4]), where=Where(tmp_path / "run"))
    with pytest.raises(RecipeError, match="begun with another model"):
        quantize_(tiny_model_in_memory("llama", 1), GPTQ, calibration=CALIBRATION, where=Where(tmp_path / "run"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(RecipeError, match="holds something else"):
        quantize_(tiny_model_in_memory("llama"), GPTQ, calibration=CALIBRATION, where=Where(tmp_path / "full"))


def test_what_cannot_be_resumed_is_told_before_a_block_runs(tmp_path: Path) -> None:
    quantize_(tiny_model_in_memory("llama"), GPTQ, calibration=CALIBRATION, where=Where(tmp_path / "run"))
    model, runs = tiny_model_in_memory("llama"), []
    model.model.layers[0].register_forward_pre_hook(lambda *_: runs.append(0))
    with pytest.raises(RecipeError, match="begun with the recipe"):
        quantize_(model, GPTQ.replace(scaler="awq"), calibration=CALIBRATION, where=Where(tmp_path / "run"))
    assert runs == []


def test_damaged_blocks_are_told(tmp_path: Path) -> None:
    quantize_(tiny_model_in_memory("llama"), GPTQ, calibration=CALIBRATION, where=Where(tmp_path / "run"))
    file = tmp_path / "run" / "block_0001.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"block_0001\.safetensors is damaged .*: begin again in another folder"):
        quantize_(tiny_model_in_memory("llama"), GPTQ, calibration=CALIBRATION, where=Where(tmp_path / "run"))


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model, a text, and what a run that nobody interrupts makes of them."""
    home = tmp_path_factory.mktemp("home")
    tiny_model("llama", home / "dense")
    (home / "text.txt").write_text(text("sqlite_train")[:20000])
    assert main([*command(home), str(home / "whole")]) == OK
    return home


def command(home: Path, *more: str) -> list[str]:
    words = ["quantize", str(home / "dense"), "--algorithm", "gptq", "--format", "int4_g64"]
    return [*words, "--calibration", str(home / "text.txt"), "--samples", "8", "--length", "32", *more]


def weights_of(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


ENDED = """
import os, signal, sys
from lowbit.blockwise.resume import ResumeFolder
from lowbit.cli import main

number, last = int(sys.argv[1]), int(sys.argv[2])
save = ResumeFolder.save_block

def save_block(self, index, *rest):
    if index == last:
        os.kill(os.getpid(), number)
    save(self, index, *rest)

ResumeFolder.save_block = save_block
signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever this run of the tests has inherited
sys.exit(main(sys.argv[3:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code"), [(9, -9), (2, INTERRUPTED), (15, 128 + 15)], ids=["kill", "ctrl-c", "term"]
)
def test_the_same_command_goes_on(
    number: int, code: int, home: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The process is ended while it works on its second block, and leaves nothing but the first one behind."""
    run, out = tmp_path / "run", tmp_path / "out"
    words = [*command(home, "--resume", str(run), "--spill", str(tmp_path / "spilled")), str(out)]
    done = subprocess.run(
        [sys.executable, "-c", ENDED, str(number), "1", *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == code and not out.exists()
    assert "Traceback" not in done.stderr
    if number != 9:
        assert done.stderr.endswith(
            f"lowbit: 1 finished block in {run}: the same command goes on there\n\nlowbit: stopped\n"
        )
        assert not list((tmp_path / "spilled").iterdir())
    first = run / "block_0000.safetensors"
    written = first.stat().st_mtime_ns
    assert not (run / "block_0001.json").exists()
    # Another recipe is refused, and both are named.
    assert main([*words, "--format", "int3_g64"]) == FAILED
    said = capfd.readouterr().err
    assert "begun with the recipe int4_g64 (" in said and "cannot be resumed with int3 (" in said
    assert main(words) == OK
    assert weights_of(out) == weights_of(home / "whole")
    assert first.stat().st_mtime_ns == written, "a finished block was computed again"
    assert f"the finished blocks in {run}" in capfd.readouterr().out


@pytest.mark.slow
def test_ctrl_c_without_a_folder_names_the_way_to_keep_blocks(home: Path, tmp_path: Path) -> None:
    program = ENDED.replace("ResumeFolder.save_block = save_block", "").replace(
        "from lowbit.cli import main",
        "from lowbit.cli import main\nfrom lowbit.blockwise.rounding import BlockRounding\n"
        "BlockRounding.round_ = lambda self: os.kill(os.getpid(), signal.SIGINT)",
    )
    words = [*command(home), str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-c", program, "2", "0", *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == INTERRUPTED and "no finished block was kept: --resume FOLDER keeps them" in done.stderr


def test_where_memory_ran_out_the_way_to_take_less_is_named(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_out(_: BlockRounding) -> None:
        raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(BlockRounding, "round_", run_out)
    said = "activations of 8 x 32 tokens were looked at: "
    assert main([*command(home), str(tmp_path / "out")]) == FAILED
    lines = capsys.readouterr().err.splitlines()
    assert f"{said}--spill FOLDER keeps them in files, and fewer --samples or a shorter --length take less" in lines[-2]
    assert lines[-1].startswith("lowbit: error: not enough memory")
    assert main([*command(home, "--spill", str(tmp_path / "spilled")), str(tmp_path / "out")]) == FAILED
    assert f"{said}fewer --samples" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--resume", "--spill"])
def test_a_folder_inside_what_is_written_is_refused(
    option: str, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main([*command(home, option, str(out / "run")), str(out)]) == FAILED
    assert f"{option} {out / 'run'} lies in {out}, where only the model will be" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize("more", [["--resume", "run"], ["--spill", "run"]], ids=["blocks", "activations"])
def test_a_disk_without_room_leaves_nothing_half_written(
    more: list[str], home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [*command(home, *more), str(tmp_path / "out")]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8000, hard))  # the first block needs more
    try:
        assert main(words) == FAILED
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("lowbit: error: ") and ("was not written" in said or "no room for the activations" in said)
    assert [file.name for file in (tmp_path / "run").iterdir()] == (["run.json"] if more[0] == "--resume" else [])
    assert main(words) == OK and weights_of(tmp_path / "out") == weights_of(home / "whole")
