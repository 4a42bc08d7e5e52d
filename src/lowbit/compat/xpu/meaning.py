"""The variable LOWBIT_XPU, and what it makes of a device that somebody names."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from typing import Any

from lowbit.errors import LowbitError

VARIABLE = "LOWBIT_XPU"
KINDS = ("cuda", "cpu")
XPU = "xpu"
# Who is told that there is no Intel GPU: torch's own compiler, which writes code for one where it hears of it, and stops where it
# hears of two kinds of GPU; and what asks for the device that several copies of a model run on (nn.DataParallel).
_OF_TORCH = ("torch._inductor", "torch.utils._triton", "torch._utils")


class DeviceError(LowbitError, RuntimeError):
    """A device that "xpu" cannot mean here."""


def chosen_kind() -> str | None:
    """What LOWBIT_XPU asks for; None without it."""
    asked = os.environ.get(VARIABLE, "").strip().lower()
    if not asked:
        return None
    if asked not in KINDS:
        raise DeviceError(f'{VARIABLE}={asked} is nothing that "xpu" can mean: it is cuda or cpu')
    return asked


def an_intel_gpu_is_there() -> bool:
    """Whether torch can make tensors on an Intel GPU: then "xpu" is that, whatever the variable says."""
    import torch

    return torch.xpu.is_available()


def is_available() -> bool:
    """`torch.xpu.is_available` where "xpu" has a meaning: yes, and to those in torch who would go on to use one, the truth."""
    return not str(sys._getframe(1).f_globals.get("__name__")).startswith(_OF_TORCH)


@dataclass(frozen=True)
class Meaning:
    """ "xpu" stands for a device of `kind`."""

    kind: str

    def of(self, device: Any) -> Any:
        """The device that is meant by one that somebody named: the same, unless it is "xpu"."""
        import torch

        if isinstance(device, str):
            return self._named(device) if device.startswith(XPU) else device
        if isinstance(device, torch.device) and device.type == XPU:
            return torch.device(self._named(str(device)))
        return device

    def of_place(self, device: Any) -> Any:
        """As `of`, where a number stands for a device too: on a machine without a GPU the number of an "xpu"."""
        if self.kind == "cpu" and isinstance(device, int) and not isinstance(device, bool):
            return self._named(f"{XPU}:{device}")
        return self.of(device)

    def _named(self, device: str) -> str:
        kind, _, index = device.partition(":")
        if kind != XPU:
            return device
        if self.kind == "cpu" and index not in ("", "0"):
            raise DeviceError(f"there is no {device}: {VARIABLE}=cpu is one device, xpu:0")
        return f"{self.kind}:{index}" if index and self.kind != "cpu" else self.kind
