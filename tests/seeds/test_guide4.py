"""The code blocks of guide 4, PyTorch on Intel GPU, with "xpu" as the CPU and a ResNet-50 that stands in for torchvision's."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch

from seeds.running import STAND_INS, run_seed, start_script

# What the data set of the stand-in makes, and where a scaler of gradients begins.
BATCHES, FIRST_SCALE = 8, 65536.0
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def fp32(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The answer of the block with FP32."""
    ran, again = run_seed("guide4/infer_fp32.py", tmp_path_factory.mktemp("fp32"), stand_ins=True)
    assert ran.lines[-1] == again.lines[-1] == "Execution finished"
    kind, *numbers = ran.lines[-2].split()
    assert kind == "torch.float32"
    return [float(number) for number in numbers]


def test_the_answer_is_that_of_the_cpu(fp32: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(STAND_INS)
    from torchvision.models import resnet50

    torch.manual_seed(0)
    model = resnet50(weights="ResNet50_Weights.DEFAULT").eval()
    with torch.no_grad():
        expected = model(torch.rand(1, 3, 224, 224))[0, :4]
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    assert fp32 == pytest.approx(expected.tolist(), rel=1e-3, abs=1e-4)


@pytest.mark.parametrize(
    ("seed", "words", "kind"),
    [
        ("infer_amp", (), "torch.float16"),
        ("infer_amp", ("bf16",), "torch.bfloat16"),
        ("infer_compiled", (), "torch.float32"),
    ],
    ids=["float16", "bfloat16", "compiled"],
)
def test_inference(seed: str, words: tuple[str, ...], kind: str, fp32: list[float], tmp_path: Path) -> None:
    for ran in run_seed(f"guide4/{seed}.py", tmp_path, *words, stand_ins=True, rewritten=kind != "torch.float16"):
        assert ran.lines[-1] == "Execution finished"
        shown, *numbers = ran.lines[-2].split()
        assert shown == kind
        assert [float(number) for number in numbers] == pytest.approx(fp32, rel=0.05, abs=0.02)


@pytest.mark.parametrize(
    ("seed", "words"),
    [("train_fp32", ()), ("train_amp", ("bf16",)), ("train_amp", ())],
    ids=["float32", "bfloat16", "float16"],
)
def test_training(seed: str, words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    half = seed == "train_amp" and not words  # a convolution in float16 takes a processor six times as long
    for ran in run_seed(f"guide4/{seed}.py", tmp_path, *words, stand_ins=True, rewritten=not half):
        assert ran.lines[:BATCHES] == [str(number) for number in range(BATCHES)]
        assert ran.lines[-1] == "Execution finished"
        losses = [float(word) for word in ran.lines[-2].split()[1:]]
        assert len(losses) == BATCHES and all(0 < loss < 10 for loss in losses)
        # A scaler starts high: where a gradient in 16 bits overflows, it leaves the step out and halves its scale.
        scale = float(ran.lines[-3].removeprefix("scale ")) if seed == "train_amp" else FIRST_SCALE
        steps = BATCHES - math.log2(FIRST_SCALE / scale)
        assert steps >= 1 if half else steps == BATCHES and sum(losses[-3:]) < 0.8 * sum(losses[:3])
        check_saved(ran.folder / "checkpoint.pth", first_weights(monkeypatch))


def first_weights(monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """The weights that the scripts begin with, by the names of the stand-in."""
    monkeypatch.syspath_prepend(STAND_INS)
    from torchvision.models import resnet50

    torch.manual_seed(0)
    weights: dict[str, torch.Tensor] = resnet50().state_dict()
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    return weights


def check_saved(file: Path, first: dict[str, torch.Tensor]) -> None:
    """Every weight has learnt, and what the optimizer remembers of it is there."""
    saved = torch.load(file, weights_only=True)
    weights = saved["model_state_dict"]
    assert weights.keys() == first.keys() and all(tensor.device.type == "cpu" for tensor in weights.values())
    assert int(weights["bn1.num_batches_tracked"]) == BATCHES and all(t.isfinite().all() for t in weights.values())
    assert not [name for name, tensor in weights.items() if torch.equal(tensor, first[name])]
    moved = [state["momentum_buffer"] for state in saved["optimizer_state_dict"]["state"].values()]
    assert len(moved) == 161 and all(momentum.isfinite().all() and momentum.any() for momentum in moved)


def test_is_there_an_intel_gpu(tmp_path: Path) -> None:
    left = {"torch.xpu.is_available": "LOWBIT_XPU=cpu in front of the command"}
    assert [ran.lines for ran in run_seed("guide4/available.py", tmp_path, left=left)] == [["True"], ["True"]]
    (ran,) = run_seed("guide4/available.py", tmp_path, xpu="", rewritten=False)
    assert ran.lines == [str(torch.xpu.is_available())]


def test_one_word_changed(tmp_path: Path) -> None:
    (ran, again) = run_seed("guide4/to_xpu.py", tmp_path)
    assert ran.lines == again.lines == ["[1.0, 2.0]"]
    if not torch.xpu.is_available():
        failed = start_script(ran.folder / "to_xpu.py", xpu="")
        assert failed.returncode == 1 and "LOWBIT_XPU" in failed.stderr
