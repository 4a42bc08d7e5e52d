"""`llm_patch` and `llm_unpatch`: transformers' and peft's own names answered by this face, and given back.

A script that imports `AutoModelForCausalLM` from transformers and `get_peft_model` from peft then works on low-bit models without a
changed line. What is put in which place is one table; `llm_unpatch` puts back what was there.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

from lowbit.compat.missing import FACES, refuse_unknown

_FACE = f"{FACES}.ipex_llm.transformers"
_ADAPTERS = ("get_peft_model", "prepare_model_for_kbit_training", "LoraConfig")
# Module, name, and the module and name that take their place.
_MODELS = [
    ("transformers", "AutoModel", f"{_FACE}.model", "AutoModel"),
    ("transformers", "AutoModelForCausalLM", f"{_FACE}.model", "AutoModelForCausalLM"),
    ("transformers", "LlamaForCausalLM", f"{_FACE}.model", "AutoModelForCausalLM"),
]
_TRAINING = [
    ("transformers", "TrainingArguments", f"{_FACE}.qlora", "TrainingArguments"),
    *(("peft", name, f"{_FACE}.qlora", name) for name in _ADAPTERS),
]
_replaced: list[tuple[Any, str, Any]] = []
bigdl_patched: str | None = None


def training() -> bool:
    """Whether `llm_patch(train=True)` is in force."""
    return bigdl_patched == "Train"


def llm_patch(train: bool = False) -> None:
    """Answer transformers' model classes, and with `train` also what training scripts take from transformers and peft."""
    global bigdl_patched
    if bigdl_patched is not None:
        return
    rows = _MODELS + _TRAINING if train else _MODELS
    found = [(home, name, getattr(importlib.import_module(face), instead)) for home, name, face, instead in rows]
    for home, name, instead in found:
        for module in _copies(home):
            _replaced.append((module, name, getattr(module, name)))
            setattr(module, name, instead)
    bigdl_patched = "Train" if train else "Inference"


def _copies(name: str) -> list[ModuleType]:
    """A module as Python knows it, and as scripts hold it: transformers enters itself anew while its models are imported."""
    found = {id(module): module for module in [importlib.import_module(name)]}
    for holder in list(sys.modules.values()):
        module = getattr(holder, "__dict__", {}).get(name)
        if isinstance(module, ModuleType) and module.__name__ == name:
            found[id(module)] = module
    return list(found.values())


def llm_unpatch() -> None:
    """Put back what `llm_patch` replaced."""
    global bigdl_patched
    while _replaced:
        module, name, before = _replaced.pop()
        setattr(module, name, before)
    bigdl_patched = None


__getattr__ = refuse_unknown(__name__, {"replace_attr": "llm_patch"})
