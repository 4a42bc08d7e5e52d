"""Each name of torch.xpu and torch.accelerator under LOWBIT_XPU=cpu: called, or refused as torch refuses it."""

from __future__ import annotations

import re

import pytest
import torch

from lowbit.compat.xpu.names import NAMES
from unit.xpu_calls import ABSENT, CALLS, OK, REFUSED_CALLS, what_became


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What became of every call, in one child of the runner."""
    if torch.xpu.is_available():
        pytest.skip('"xpu" is an Intel GPU on this machine')
    return what_became(CALLS | REFUSED_CALLS, "cpu", tmp_path_factory.mktemp("calls"))


@pytest.mark.parametrize("name", CALLS)
def test_each_name_is_called(name: str, said: dict[str, str]) -> None:
    assert said[name] == OK


@pytest.mark.parametrize("name", REFUSED_CALLS)
def test_the_rest_of_torch_xpu_is_torchs_own(name: str, said: dict[str, str]) -> None:
    """It raises what torch raises without an Intel GPU."""
    error = said[name].partition(":")[0]
    if said[name] == ABSENT:
        pytest.skip(f"torch {torch.__version__} has no {name}")
    assert error in ("AttributeError", "ImportError", "NotImplementedError", "OSError", "RuntimeError")


def test_every_name_has_its_call() -> None:
    rows = {row.old for row in NAMES if re.fullmatch(r"torch\.(xpu|accelerator)\.\w+", row.old)}
    assert rows - {"torch.xpu.optimize"} == CALLS.keys() | REFUSED_CALLS.keys()
