"""`ipex.xpu`: what that library gave torch for Intel GPUs is torch's own today, and this is torch's (see `lowbit.compat.xpu`)."""

from __future__ import annotations

from typing import Any

from lowbit.compat.missing import UnknownNameError
from lowbit.compat.names import WORKS, Name
from lowbit.errors import nearest


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    import torch

    if not hasattr(torch.xpu, name):
        raise UnknownNameError(f"lowbit has no {_PLACE}.{name}: {nearest(name, dir(torch.xpu))}")
    return getattr(torch.xpu, name)


_PLACE = "intel_extension_for_pytorch.xpu"
NAMES = (Name(_PLACE, "", WORKS, "tests/unit/test_compat_ipex.py::test_small_names", "torch.xpu"),)
