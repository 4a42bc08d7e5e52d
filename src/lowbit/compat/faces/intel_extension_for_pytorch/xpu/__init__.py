"""`ipex.xpu`: what that library gave torch for Intel GPUs is torch's own today, and this is torch's (see `lowbit.compat.xpu`)."""

from __future__ import annotations

from typing import Any

from lowbit.compat.names import WORKS, Name


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    import torch

    return getattr(torch.xpu, name)


NAMES = (
    Name("intel_extension_for_pytorch.xpu", "", WORKS, "tests/unit/test_compat_ipex.py::test_small_names", "torch.xpu"),
)
