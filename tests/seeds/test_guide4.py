"""The code blocks of guide 4, PyTorch on Intel GPU, with "xpu" as the CPU and a ResNet-50 that stands in for torchvision's."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from seeds.running import STAND_INS, run_seed, start_script

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def fp32(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The answer of the block with FP32."""
    ran = run_seed("guide4/infer_fp32.py", tmp_path_factory.mktemp("fp32"), stand_ins=True)
    assert ran.lines[-1] == "Execution finished"
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


@pytest.mark.parametrize("seed", ["infer_amp", "infer_compiled"])
def test_inference(seed: str, fp32: list[float], tmp_path: Path) -> None:
    ran = run_seed(f"guide4/{seed}.py", tmp_path, stand_ins=True)
    assert ran.lines[-1] == "Execution finished"
    kind, *numbers = ran.lines[-2].split()
    assert kind == {"infer_amp": "torch.float16", "infer_compiled": "torch.float32"}[seed]
    assert [float(number) for number in numbers] == pytest.approx(fp32, rel=0.05, abs=0.02)


@pytest.mark.parametrize("seed", ["train_fp32", "train_amp"])
def test_training(seed: str, tmp_path: Path) -> None:
    ran = run_seed(f"guide4/{seed}.py", tmp_path, stand_ins=True)
    assert ran.lines[0] == "0" and ran.lines[-1] == "Execution finished"
    loss = float(ran.lines[-2].removeprefix("loss "))
    assert 4 < loss < 10  # of a thousand classes, untrained: about 6.9
    saved = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    weights = saved["model_state_dict"]
    assert len(weights) == 320 and all(tensor.device.type == "cpu" for tensor in weights.values())
    assert int(weights["bn1.num_batches_tracked"]) == 1 and all(t.isfinite().all() for t in weights.values())
    moved = [state["momentum_buffer"] for state in saved["optimizer_state_dict"]["state"].values()]
    # A scaler starts high: where a gradient in 16 bits overflows, it leaves the step out and halves its scale.
    left_out = "scale 32768.0" in ran.lines
    assert left_out or seed == "train_fp32" or "scale 65536.0" in ran.lines
    assert len(moved) == (0 if left_out else 161) and all(momentum.isfinite().all() for momentum in moved)


def test_is_there_an_intel_gpu(tmp_path: Path) -> None:
    assert run_seed("guide4/available.py", tmp_path).lines == ["True"]
    assert run_seed("guide4/available.py", tmp_path, xpu="").lines == [str(torch.xpu.is_available())]


def test_one_word_changed(tmp_path: Path) -> None:
    assert run_seed("guide4/to_xpu.py", tmp_path).lines == ["[1.0, 2.0]"]
    if not torch.xpu.is_available():
        failed = start_script(tmp_path / "to_xpu.py", xpu="")
        assert failed.returncode == 1 and "LOWBIT_XPU" in failed.stderr
