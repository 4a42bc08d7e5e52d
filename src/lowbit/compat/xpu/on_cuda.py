"""torch.xpu when "xpu" is an NVIDIA GPU: each name is torch.cuda's, told "cuda" where it is told "xpu".

torch.accelerator means that GPU already; only the device that it may be told is said in its words.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from lowbit.compat.replacing import Replacement
from lowbit.compat.xpu.meaning import VARIABLE, DeviceError, Meaning, is_available
from lowbit.compat.xpu.places import anywhere

# torch.cuda has these under another name or in another form.
OTHER_NAMES = {"XPUGraph": "CUDAGraph"}
# Classes that are told a device, as functions that make them; all others stay the classes that they are.
TOLD_A_DEVICE = ("device", "device_of")
# What torch.cuda has not, or means otherwise.
LEFT_OUT = ("XPUPluggableAllocator", "change_current_allocator", "streams", "device_memory_used")
# The functions of torch.accelerator that may be told a device.
ACCELERATOR_NAMES = (
    "current_stream", "get_device_capability", "get_memory_info", "max_memory_allocated", "max_memory_reserved",
    "memory_allocated", "memory_reserved", "memory_stats", "reset_accumulated_memory_stats", "reset_peak_memory_stats",
    "set_device_idx", "set_device_index", "synchronize",
)  # fmt: skip


def replacements(meaning: Meaning) -> Iterator[Replacement]:
    if not torch.cuda.is_available():
        raise DeviceError(
            f"{VARIABLE}=cuda, and torch sees no NVIDIA GPU here: use {VARIABLE}=cpu, and see `lowbit doctor`"
        )
    for name in torch.xpu.__all__:
        theirs = getattr(torch.cuda, OTHER_NAMES.get(name, name), None)
        if theirs is not None and name not in LEFT_OUT:
            yield Replacement(torch.xpu, name, answered(name, theirs, meaning))
    for name in ACCELERATOR_NAMES:
        if hasattr(torch.accelerator, name):
            yield Replacement(torch.accelerator, name, anywhere(getattr(torch.accelerator, name), meaning))


def answered(name: str, theirs: Any, meaning: Meaning) -> Any:
    """torch.cuda's name for torch.xpu's."""
    if name == "Stream":
        return stream_class(meaning)
    if name == "is_available":
        return is_available
    if name == "default_generators":
        return Generators()
    if name == "get_device_capability":
        return lambda device=None: {"name": torch.cuda.get_device_name(meaning.of(device))}
    if not callable(theirs) or (isinstance(theirs, type) and name not in TOLD_A_DEVICE):
        return theirs
    return anywhere(theirs, meaning)


class Generators(Sequence[torch.Generator]):
    """torch.cuda.default_generators, which torch fills when it first uses the GPU: looked up each time."""

    def __len__(self) -> int:
        torch.cuda.init()  # type: ignore[no-untyped-call]
        return len(torch.cuda.default_generators)

    def __getitem__(self, index: Any) -> Any:
        torch.cuda.init()  # type: ignore[no-untyped-call]
        return torch.cuda.default_generators[index]


def stream_class(meaning: Meaning) -> type[torch.cuda.Stream]:
    """torch.cuda.Stream, for a device that may be called "xpu"."""

    class Stream(torch.cuda.Stream):
        def __new__(cls, device: Any = None, priority: int = 0, **kwargs: Any) -> Stream:
            return super().__new__(cls, meaning.of(device), priority, **kwargs)  # type: ignore[no-any-return, no-untyped-call]

    return Stream
