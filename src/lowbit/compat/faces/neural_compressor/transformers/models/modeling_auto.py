"""The auto classes: lowbit's, on the device that this library took where none was named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lowbit.checkpoint import auto
from lowbit.compat.ignored import say_ignored
from lowbit.compat.missing import refuse_unknown

__all__ = ["AutoModel", "AutoModelForCausalLM", "AutoModelForSeq2SeqLM"]
__getattr__ = refuse_unknown(__name__, {"_BaseINCAutoModelClass": "lowbit.AutoModel"})

# Keywords of `from_pretrained` that older scripts pass, and why nothing depends on them.
IDLE = {
    "use_llm_runtime": "there is one engine, and it runs what is low-bit",
    "use_neural_speed": "there is one engine, and it runs what is low-bit",
    "use_layer_wise": "one block is in memory at a time in any case",
    "is_vlm": "what can be packed is found in the model itself",
}


class Loading:
    """What the classes of this library do before lowbit's."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, *model_args: Any, **kwargs: Any) -> Any:
        for name, reason in IDLE.items():
            if kwargs.pop(name, None):
                say_ignored(f"neural_compressor.transformers.{cls.__name__}.from_pretrained", name, reason)
        if kwargs.get("device_map") is None and torch.xpu.is_available():
            kwargs["device_map"] = "xpu"
        return super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)  # type: ignore[misc]


class AutoModel(Loading, auto.AutoModel):
    """`AutoModel` of this library."""


class AutoModelForCausalLM(Loading, auto.AutoModelForCausalLM):
    """`AutoModelForCausalLM` of this library."""


class AutoModelForSeq2SeqLM(Loading, auto.AutoModelForSeq2SeqLM):
    """`AutoModelForSeq2SeqLM` of this library."""
