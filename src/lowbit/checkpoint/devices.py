"""`device_map`: where a model's weights shall lie, looked at before anything is read.

A device is a name ("cpu", "cuda:1"), a number, a torch.device, a map from modules to these, or a word such as "auto" for a
map that accelerate makes. Maps over several GPUs are accelerate's work. What cannot come to a good end is refused here:
devices that are not there, and weights on the disk or partly on the CPU, which would be copied at every call. A low-bit
model is small: it fits where it runs, or it runs elsewhere.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch

from lowbit.configs.base import WeightOnlyConfig
from lowbit.errors import CheckpointError, RecipeError

# Words for a map that is made from the memory that is free.
WORDS = ("auto", "balanced", "balanced_low_0", "sequential")
# Where a word leads a model that is read in one piece, if torch sees such a device.
_GPUS = ("cuda", "xpu")
# Neural Compressor's variable for where a model is quantised, what it may say in whatever case, and what its configurations
# say where they leave the choice.
TARGET_VARIABLE = "INC_TARGET_DEVICE"
TARGETS = ("cpu", "cuda", "xpu", "hpu")
_ANY = "auto"


def check_device_map(device_map: Any) -> None:
    """Refuse a map that names a device which is not there, or which would hold weights and not run them."""
    places = list(device_map.values()) if isinstance(device_map, dict) else [device_map]
    kinds = {_kind(place) for place in places if place is not None and place not in WORDS}
    if "disk" in kinds:
        raise CheckpointError(
            "device_map sends weights to the disk, from where they would be read at every call; "
            "a low-bit model is small: use device_map='cpu', or a format of fewer bits"
        )
    if "meta" in kinds:
        raise CheckpointError(
            "device_map='meta' would load no weights; lowbit.low_memory_init() makes a model without them"
        )
    for kind in sorted(kinds):
        if not _is_there(kind):
            other = ", LOWBIT_XPU=cpu (or cuda) under `python -m lowbit.compat`" if kind == "xpu" else ""
            raise CheckpointError(
                f"torch sees no {kind} device here: use device_map='cpu'{other}, and see `lowbit doctor`"
            )
    if "cpu" in kinds and len(kinds) > 1:
        raise CheckpointError(
            f"device_map splits the model between cpu and {', '.join(sorted(kinds - {'cpu'}))}, and the part on the CPU would be "
            "copied at every call; use one kind of device, or a format of fewer bits"
        )


def one_place(device_map: Any) -> Any:
    """The one device that a map means for a model that is read in one piece: for a word the first GPU, None for the CPU."""
    if isinstance(device_map, dict):
        places = {str(place): place for place in device_map.values()}
        if len(places) > 1:
            raise CheckpointError(
                f"device_map spreads the model over {', '.join(sorted(places))}, and a folder of this kind is read in one piece: "
                "name one device, or save the model with save_low_bit and load that folder"
            )
        device_map = next(iter(places.values()), None)
    return next(filter(_is_there, _GPUS), None) if device_map in WORDS else device_map


def quantizing_device(config: WeightOnlyConfig | None, device_map: Any) -> str | None:
    """Where a configuration of Neural Compressor has a model quantised, if that is not where it shall run."""
    if config is None:
        return None
    variable = os.environ.get(TARGET_VARIABLE, "").strip().lower()
    asked = variable or config.device
    if asked == _ANY:
        return None
    said = f"{TARGET_VARIABLE}={variable}" if variable else f"device={asked!r}"
    if str(asked).partition(":")[0] not in TARGETS:
        raise RecipeError(f"{said} names no device to quantise on: it is one of {', '.join(TARGETS)}")
    if isinstance(device_map, dict) or device_map in WORDS:
        raise RecipeError(
            f"{said} quantises on one device, and device_map={device_map!r} spreads the model: name one device for it"
        )
    check_device_map(asked)
    wanted = torch.device("cpu" if device_map is None else device_map)
    return None if torch.device(asked).type == wanted.type else str(asked)


def _kind(place: Any) -> str:
    """The kind of device that a place of a map stands for."""
    if isinstance(place, int):
        if not torch.accelerator.is_available():
            raise CheckpointError(
                f"device_map names device {place}, and torch sees no GPU here: use device_map='cpu', and see `lowbit doctor`"
            )
        return torch.device(place).type
    return place.type if isinstance(place, torch.device) else str(place).partition(":")[0]


def _is_there(kind: str) -> bool:
    """Whether torch sees a device of a kind; of kinds that it does not know, it shall speak itself."""
    seen: dict[str, Callable[[], bool]] = {
        "cuda": torch.cuda.is_available,
        "xpu": torch.xpu.is_available,
        "mps": torch.backends.mps.is_available,
        "hpu": lambda: hasattr(torch, "hpu"),  # a package of its maker's puts it there
    }
    return kind not in seen or seen[kind]()
