"""What Intel Extension for PyTorch added to torch.xpu, and plain PyTorch never had."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch

from lowbit.compat.missing import FACES
from lowbit.compat.replacing import Replacement
from lowbit.compat.xpu.meaning import XPU


def optimize(*args: Any, **kwargs: Any) -> Any:
    """`torch.xpu.optimize` is `ipex.optimize`."""
    return importlib.import_module(f"{FACES}.intel_extension_for_pytorch").optimize(*args, **kwargs)


def replacements() -> Iterator[Replacement]:
    """Functions of torch are looked up when they are called, since by then they know what "xpu" means."""
    names = {
        "amp": SimpleNamespace(
            autocast=functools.partial(torch.autocast, XPU), GradScaler=functools.partial(torch.amp.GradScaler, XPU)
        ),
        "optimize": optimize,
        "get_autocast_xpu_dtype": lambda: torch.get_autocast_dtype(XPU),
        "set_autocast_xpu_dtype": lambda dtype: torch.set_autocast_dtype(XPU, dtype),
        "is_autocast_xpu_enabled": lambda: torch.is_autocast_enabled(XPU),
        "set_autocast_xpu_enabled": lambda enabled: torch.set_autocast_enabled(XPU, enabled),
    }
    for name, value in names.items():
        if not hasattr(torch.xpu, name):
            yield Replacement(torch.xpu, name, value)
