"""Neither an Intel GPU nor LOWBIT_XPU: torch's own error, and one sentence beside it; other errors are left as they are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lowbit.compat.xpu.absent import about_xpu
from lowbit.compat.xpu.meaning import DeviceError
from unit.test_compat_xpu import run

pytestmark = pytest.mark.skipif(torch.xpu.is_available(), reason='"xpu" is an Intel GPU on this machine')


@pytest.mark.parametrize(
    "statement",
    [
        "torch.zeros(2).to('xpu')",
        "torch.zeros(2, device='xpu')",
        "torch.nn.Linear(2, 2).xpu()",
        "torch.Generator('xpu')",
        "torch.serialization.default_restore_location(torch.ones(2).untyped_storage(), 'xpu:0')",
        "torch.xpu.synchronize()",
        "torch.xpu.Stream()",
        "torch.xpu.Event()",
        "torch.xpu.optimize(torch.nn.Linear(2, 2))",
        "torch.xpu.amp.autocast()",
    ],
)
def test_what_torch_says_is_met(statement: str) -> None:
    with pytest.raises(Exception) as raised:  # torch has a class of error for each of them
        exec(statement, {"torch": torch})
    assert str(about_xpu(raised.value)).startswith("lowbit.compat: torch sees no Intel GPU here; LOWBIT_XPU=cpu")


@pytest.mark.parametrize(
    "statement",
    [
        "open('xpu_results.json')",
        "torch.zeros(2).to('xpuu')",
        "torch.zeros(2).to('cudaa')",  # torch lists all devices that it knows, "xpu" among them
        "torch.xpu.no_such_name",
        "torch.xpu.temperature()",  # needs a package, whatever the device
        "torch.cuda.Stream()",
        "raise RuntimeError('the xpu is on fire')",
    ],
)
def test_other_errors_are_left_alone(statement: str) -> None:
    if "cuda" in statement and torch.cuda.is_available():
        pytest.skip("there is an NVIDIA GPU on this machine")
    with pytest.raises(Exception) as raised:  # of whatever class
        exec(statement, {"torch": torch})
    assert about_xpu(raised.value) is None


def test_our_own_sentence_is_enough() -> None:
    assert about_xpu(DeviceError("Torch not compiled with XPU enabled")) is None


def test_neither_a_gpu_nor_the_variable(tmp_path: Path) -> None:
    result = run("import torch\ntorch.zeros(2).to('xpu')", tmp_path)
    *_, torchs, ours = result.stderr.splitlines()
    assert result.returncode == 1 and "Torch not compiled with XPU enabled" in torchs
    assert ours.startswith("lowbit.compat: torch sees no Intel GPU here; LOWBIT_XPU=cpu")


def test_a_script_that_fails_otherwise(tmp_path: Path) -> None:
    result = run("import torch\nopen('xpu.json')", tmp_path)
    assert result.returncode == 1 and "xpu.json" in result.stderr and "LOWBIT_XPU" not in result.stderr
