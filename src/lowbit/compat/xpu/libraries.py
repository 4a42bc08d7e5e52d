"""The doors of transformers through which a device goes past torch: `device_map`, which is read as a word."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

from lowbit.compat.replacing import Replacement
from lowbit.compat.xpu.meaning import Meaning

# Words that ask for the devices there are; when "xpu" is the CPU, that is one.
SPREAD = ("auto", "balanced", "balanced_low_0", "sequential")


def meant_map(device_map: Any, meaning: Meaning) -> Any:
    """A `device_map` as it is meant."""
    if isinstance(device_map, dict):
        return {module: meaning.of_place(place) for module, place in device_map.items()}
    if device_map in SPREAD and meaning.kind == "cpu":
        return "cpu"
    return meaning.of_place(device_map)


def replacements(meaning: Meaning) -> Iterator[Replacement]:
    from transformers import modeling_utils

    model = modeling_utils.PreTrainedModel
    original = vars(model)["from_pretrained"].__func__

    @functools.wraps(original)
    def from_pretrained(cls: type, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("device_map") is not None:
            kwargs["device_map"] = meant_map(kwargs["device_map"], meaning)
        return original(cls, *args, **kwargs)

    yield Replacement(model, "from_pretrained", classmethod(from_pretrained))
