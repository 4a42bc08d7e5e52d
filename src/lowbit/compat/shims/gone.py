"""Names and modules that scripts import and that are elsewhere today, or nowhere."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from lowbit.compat.replacing import Replacement
from lowbit.compat.shims.shim import say

# Where transformers has them now, by the module and name that a script asks for.
MOVED_NAMES = {
    ("transformers", "AutoModelForVision2Seq"): ("transformers", "AutoModelForImageTextToText"),
    ("transformers", "AutoModelWithLMHead"): ("transformers", "AutoModelForCausalLM"),
    ("transformers", "is_torch_tpu_available"): ("transformers.utils", "is_torch_xla_available"),
    ("transformers", "AdamW"): ("lowbit.compat.shims.adamw", "AdamW"),
}
MOVED_MODULES = {
    "transformers.deepspeed": "transformers.integrations.deepspeed",
    "transformers.generation_utils": "transformers.generation.utils",
    "transformers.tokenization_utils": "transformers.tokenization_utils_sentencepiece",
    "transformers.tokenization_utils_fast": "transformers.tokenization_utils_tokenizers",
}


def lazy_names(module: ModuleType) -> Iterator[Replacement]:
    """transformers looks up its names when they are first used; what it does not find is looked for here."""
    cls = module._LazyModule
    original = cls.__getattr__

    @functools.wraps(original)
    def find(self: ModuleType, name: str) -> Any:
        try:
            return original(self, name)
        except AttributeError:
            place = MOVED_NAMES.get((self.__name__, name))
            if place is None:
                raise
        home, now = place
        where = "is torch's today" if home.startswith("lowbit") else f"is {home}.{now} today"
        say(f"{self.__name__}.{name}", where)
        return getattr(importlib.import_module(home), now)

    yield Replacement(cls, "__getattr__", find)


def optimization(module: ModuleType) -> Iterator[Replacement]:
    """`transformers.optimization.AdamW`."""
    if not hasattr(module, "AdamW"):
        from lowbit.compat.shims.adamw import AdamW

        yield Replacement(module, "AdamW", AdamW)


def attention_classes(module: ModuleType) -> Iterator[Replacement]:
    """One class of attention has taken the place of three."""
    for name in ("LlamaSdpaAttention", "LlamaFlashAttention2"):
        if not hasattr(module, name):
            yield Replacement(module, name, module.LlamaAttention)


def peft_names(module: ModuleType) -> Iterator[Replacement]:
    """`peft.prepare_model_for_int8_training`."""
    if hasattr(module, "prepare_model_for_int8_training"):
        return
    now = module.prepare_model_for_kbit_training

    @functools.wraps(now)
    def prepare(*args: Any, **kwargs: Any) -> Any:
        say("peft.prepare_model_for_int8_training", "is prepare_model_for_kbit_training today")
        return now(*args, **kwargs)

    yield Replacement(module, "prepare_model_for_int8_training", prepare)


def no_neural_compressor(module: ModuleType) -> Iterator[Replacement]:
    """peft asks whether the package is installed, to look for layers of its own; lowbit answers its name, and has none of these."""
    yield Replacement(module, "is_inc_available", lambda: False)
