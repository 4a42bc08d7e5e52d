"""Scripts that say "xpu", on an NVIDIA GPU: under LOWBIT_XPU=cuda they do what they do with the word changed.

    LOWBIT_XPU=cuda python -m lowbit.compat script.py    and    python script.py, in which "xpu" is written "cuda"

print the same numbers. It takes torch, transformers, accelerate and pytest; the scripts of the guide take a compiler for the last.
"""

from __future__ import annotations

import io
import shutil
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import lowbit.compat
from lowbit.compat.xpu import meaning
from seeds.running import SEEDS, Ran, run_script
from unit.checkpoint_cases import EVEN, make
from unit.xpu_calls import ABSENT, CALLS, OK, train_with_a_scaler, what_became, without_us

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

# Triton compiles a small file of C that reads it.
# Batches of training whose losses are the same in every run.
STEADY = 2
PYTHON_H = Path(sysconfig.get_path("include")) / "Python.h"


@pytest.fixture
def on_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv(meaning.VARIABLE, "cuda")
    with lowbit.compat.install(children=False):
        yield


@pytest.mark.parametrize("device", ["xpu", "xpu:0", torch.device("xpu"), torch.device("xpu", 0)])
@pytest.mark.usefixtures("on_cuda")
def test_tensors_and_modules_move(device: str | torch.device) -> None:
    x = torch.rand(2, 3)
    for moved in (x.to(device), x.to(device, torch.float32), x.to(device=device, non_blocking=True), x.xpu(), x.xpu(0)):
        assert moved.device.type == "cuda" and moved.is_xpu and torch.equal(moved.cpu(), x)
    model = torch.nn.Linear(3, 4, device=device).to(device).xpu()
    assert model.weight.device.type == model(x.to(device)).device.type == "cuda"
    assert torch.nn.Linear(3, 4).to(device=device, dtype=torch.bfloat16).weight.dtype == torch.bfloat16
    assert x.device.type == x.to("cpu").device.type == "cpu" and not x.is_xpu


@pytest.mark.usefixtures("on_cuda")
def test_tensors_are_made() -> None:
    x = torch.rand(2, 3)
    made = [
        torch.tensor([1, 2], device="xpu"), torch.as_tensor([1, 2], device="xpu:0"), torch.zeros(2, device="xpu"),
        torch.arange(3, device=torch.device("xpu")), torch.rand_like(x, device="xpu"), x.new_zeros(2, device="xpu"),
        torch.randperm(4, device="xpu"), torch.randint(0, 3, (2,), device="xpu"), torch.full((2,), 1.0, device="xpu"),
    ]  # fmt: skip
    assert {tensor.device.type for tensor in made} == {"cuda"}
    with torch.device("xpu"):
        assert torch.ones(2).device.type == torch.nn.Linear(2, 2).weight.device.type == "cuda"
    assert torch.ones(2).device.type == "cpu"
    drawn = torch.randn(3, generator=torch.Generator(device="xpu").manual_seed(7), device="xpu")
    assert torch.equal(drawn, torch.randn(3, generator=torch.Generator("cuda").manual_seed(7), device="cuda"))


@pytest.mark.usefixtures("on_cuda")
def test_mixed_precision() -> None:
    a, b = torch.rand(4, 4, device="xpu"), torch.rand(4, 4, device="xpu")
    with torch.autocast(device_type="xpu", dtype=torch.bfloat16, enabled=True):
        assert (a @ b).dtype == torch.bfloat16 and torch.is_autocast_enabled("xpu")
    with torch.autocast("xpu"):
        assert (a @ b).dtype == torch.float16
    with torch.xpu.amp.autocast(enabled=True, dtype=torch.bfloat16):  # type: ignore[attr-defined]
        assert (a @ b).dtype == torch.bfloat16
    assert (a @ b).dtype == torch.float32


@pytest.mark.parametrize("arguments", [(), ("xpu",)])
@pytest.mark.usefixtures("on_cuda")
def test_training_with_a_scaler(arguments: tuple[str, ...], tmp_path: Path) -> None:
    model, _ = train_with_a_scaler(torch.amp.GradScaler(*arguments, enabled=True), steps=40)
    torch.save({"model": model.state_dict()}, tmp_path / "checkpoint.pth")
    for place in ("xpu", torch.device("xpu", 0), {"cuda:0": "xpu:0"}, None):
        saved = torch.load(tmp_path / "checkpoint.pth", map_location=place)["model"]["weight"]
        assert saved.device.type == "cuda" and torch.equal(saved, model.weight)


@pytest.mark.usefixtures("on_cuda")
def test_files_that_were_saved_on_an_intel_gpu() -> None:
    file = io.BytesIO()
    torch.save(torch.arange(3), file)
    file.seek(0)
    assert torch.load(file, map_location="xpu").device.type == "cuda"
    storage = torch.serialization.default_restore_location(torch.arange(3).untyped_storage(), "xpu:0")
    assert storage.device.type == "cuda"


@pytest.mark.usefixtures("on_cuda")
def test_streams_and_events() -> None:
    stream, start, end = torch.xpu.Stream(), torch.xpu.Event(enable_timing=True), torch.xpu.Event(enable_timing=True)
    stream.wait_stream(torch.xpu.current_stream())
    with torch.xpu.stream(stream), torch.xpu.device("xpu:0"):
        start.record()
        x = torch.rand(64, 64).pin_memory().to("xpu", non_blocking=True)
        y = x @ x
        x.record_stream(stream)
        end.record()
    torch.xpu.current_stream().wait_stream(stream)
    torch.xpu.synchronize()
    assert end.query() and start.elapsed_time(end) >= 0 and y.device.type == "cuda"


@pytest.mark.usefixtures("on_cuda")
def test_a_profile() -> None:
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.XPU]
    with torch.profiler.profile(activities=activities) as profile:
        _ = torch.rand(4, 4).to("xpu") @ torch.rand(4, 4).to("xpu")
        torch.xpu.synchronize()
    assert "aten::mm" in profile.key_averages().table(sort_by="self_xpu_time_total", row_limit=50)


def test_undo_gives_everything_back(monkeypatch: pytest.MonkeyPatch) -> None:
    names, accelerator = dict(vars(torch.xpu)), dict(vars(torch.accelerator))
    monkeypatch.setenv(meaning.VARIABLE, "cuda")
    with lowbit.compat.install(children=False):
        assert torch.xpu.is_available() and torch.xpu.device_count() == torch.cuda.device_count()
    assert vars(torch.xpu) == names and vars(torch.accelerator) == accelerator
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(2).to("xpu")


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return what_became(CALLS, "cuda", tmp_path_factory.mktemp("calls"))


@pytest.fixture(scope="module")
def torchs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return without_us(CALLS, tmp_path_factory.mktemp("torchs"))


@pytest.mark.parametrize("name", CALLS)
def test_each_name_of_torch_xpu(name: str, said: dict[str, str], torchs: dict[str, str]) -> None:
    """torch.accelerator's names are torch's own: what one cannot say of an NVIDIA GPU, it says in the same words."""
    if said[name] == ABSENT:
        pytest.skip(f"torch {torch.__version__} has no {name}")
    assert said[name] == torchs.get(name, OK)


def run_both(script: Path, *arguments: object, stand_ins: bool = False) -> tuple[Ran, Ran]:
    """A script through the runner as it is, and by Python alone with the word changed."""
    changed = script.with_name(f"changed_{script.name}")
    changed.write_text(script.read_text().replace('"xpu"', '"cuda"').replace("torch.xpu", "torch.cuda"))
    ours = run_script(script, *arguments, xpu="cuda", stand_ins=stand_ins)
    return ours, run_script(changed, *arguments, xpu="", stand_ins=stand_ins, runner=False)


def numbers(ran: Ran) -> tuple[list[str], list[float]]:
    """The words that a script printed, and the numbers; a scaler's scale is halved or not, as sums fall out."""
    words, found = [], []
    for word in " ".join(line for line in ran.lines if not line.startswith("scale ")).split():
        try:
            found.append(float(word))
        except ValueError:
            words.append(word)
    return words, found


@pytest.mark.parametrize("seed", ["available", "to_xpu", "infer_fp32", "infer_amp", "train_fp32", "train_amp"])
def test_the_scripts_of_the_guide(seed: str, tmp_path: Path) -> None:
    script = Path(shutil.copy(SEEDS / "guide4" / f"{seed}.py", tmp_path))
    ours, theirs = run_both(script, stand_ins=True)
    # The same kernels on the same numbers; some of cuDNN's add up in another order each time, and every step of training
    # multiplies what that makes: from the third on two runs are some percent apart.
    half, (words, found), (their_words, expected) = seed.endswith("amp"), numbers(ours), numbers(theirs)
    assert words == their_words and len(found) == len(expected) and len(ours.out) > 0
    steady = (
        len(found) // 2 + STEADY if seed.startswith("train") else len(found)
    )  # the batches by number, then the losses
    assert found[:steady] == pytest.approx(expected[:steady], rel=5e-2 if half else 1e-2, abs=2e-2 if half else 2e-3)
    if seed.startswith("train"):
        saved = torch.load(tmp_path / "checkpoint.pth", weights_only=True)["model_state_dict"]
        assert {tensor.device.type for tensor in saved.values()} == {"cuda"}


@pytest.mark.skipif(not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="torch.compile needs a C compiler")
@pytest.mark.skipif(not PYTHON_H.is_file(), reason="torch.compile on a GPU needs the headers of Python")
def test_the_script_of_the_guide_that_compiles(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="torch.compile needs Triton on a GPU")
    compiled, plain = (
        run_script(Path(shutil.copy(SEEDS / "guide4" / f"{seed}.py", tmp_path)), xpu="cuda", stand_ins=True)
        for seed in ("infer_compiled", "infer_fp32")
    )
    assert numbers(compiled)[0] == numbers(plain)[0]
    assert numbers(compiled)[1] == pytest.approx(numbers(plain)[1], rel=2e-2, abs=1e-2)


MODELS = """\
import sys
import torch
import transformers

ids = torch.arange(3, 35)[None].to("xpu")
for place in ("xpu", "auto", {"": "xpu"}):
    model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], device_map=place)
    output = model.generate(ids, max_new_tokens=6, do_sample=False)
    print(model.device.type, output.device.type, *output[0].tolist())

if torch.xpu.is_available():
    from LIBRARY import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], load_in_4bit=True).to("xpu")
    with torch.inference_mode():
        output = model.generate(ids, max_new_tokens=6, do_sample=False)
    torch.xpu.synchronize()
    print(model.device.type, output.device.type, *output[0].tolist())
"""


def test_a_script_with_models(tmp_path: Path) -> None:
    folder = make("llama", tmp_path / "dense", **EVEN)
    script, changed = tmp_path / "models.py", tmp_path / "changed.py"
    script.write_text(MODELS.replace("LIBRARY", "ipex_llm.transformers"))
    written = MODELS.replace("LIBRARY", "lowbit").replace('"xpu"', '"cuda"').replace("torch.xpu", "torch.cuda")
    changed.write_text(written)
    ours = run_script(script, folder, xpu="cuda")
    assert ours.lines == run_script(changed, folder, xpu="", runner=False).lines
    assert len(ours.lines) == 4 and all(line.startswith("cuda cuda 3 4 5") for line in ours.lines)
