"""`ipex_llm.optimize`: a torch model that is there already, made low-bit, saved and loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowbit.checkpoint.load import load_low_bit as _load_low_bit
from lowbit.checkpoint.load import low_memory_init
from lowbit.compat.faces.ipex_llm.old_model import adopt, say_ignored_in
from lowbit.compat.ignored import say_ignored
from lowbit.compat.missing import refuse_unknown
from lowbit.compat.names import IGNORED, WORKS, Name
from lowbit.errors import LowbitError
from lowbit.optimize import optimize_model as _optimize_model

__all__ = ["load_low_bit", "low_memory_init", "optimize_model"]

_OWNER = "optimize_model"
# The networks of a diffusers pipeline that do its work, one of which it has.
_NETWORKS = ("unet", "transformer")
KERNELS = "kernels are chosen per layer in any case"
IDLE = {
    "disable_optimize_pre": "there is no separate first pass to leave out",
    "lightweight_bmm": "attention is left to the model",
}


def optimize_model(
    model: Any,
    low_bit: str | None = "sym_int4",
    optimize_llm: bool = True,
    modules_to_not_convert: list[str] | None = None,
    cpu_embedding: bool = False,
    **kwargs: Any,
) -> Any:
    """Make a torch model low-bit in place, or the network of a diffusers pipeline; `low_bit=None` leaves the weights alone."""
    if not isinstance(model, nn.Module):
        return _optimize_pipeline(model, low_bit, modules_to_not_convert=modules_to_not_convert, **kwargs)
    if not optimize_llm:
        say_ignored(_OWNER, "optimize_llm", KERNELS)
    say_ignored_in(_OWNER, kwargs, IDLE)
    cpu_embedding = kwargs.pop("replace_embedding", False) or cpu_embedding
    if kwargs.get("torch_dtype") == "auto":
        kwargs.pop("torch_dtype")
    given = kwargs.get("torch_dtype")
    if low_bit == "fp16" and given not in (None, torch.float16):
        raise LowbitError(f"low_bit='fp16' and torch_dtype={given} contradict each other: leave one of them out")
    made = _optimize_model(model, low_bit, optimize_llm, modules_to_not_convert, cpu_embedding, **kwargs)
    return adopt(made, low_bit)


def _optimize_pipeline(pipeline: Any, low_bit: str | None, **options: Any) -> Any:
    for name in _NETWORKS:
        network = getattr(pipeline, name, None)
        if isinstance(network, nn.Module):
            setattr(pipeline, name, optimize_model(network, low_bit, **options))
            return pipeline
    raise LowbitError(f"optimize_model takes a torch module or a diffusers pipeline, not a {type(pipeline).__name__}")


def load_low_bit(model: nn.Module, model_path: str | Path, *, allow_pickle: bool = False) -> nn.Module:
    """Fill a model from a folder that its `save_low_bit` wrote; one that the old library wrote needs `allow_pickle=True`."""
    filled: nn.Module = adopt(_load_low_bit(model, model_path, allow_pickle), None)
    return filled


__getattr__ = refuse_unknown(__name__, {"low_bit_sanity_check": "lowbit.load_low_bit, which checks the folder itself"})

_UNIT = "tests/unit/test_compat_bigdl.py::"
_GUIDE = f"{_UNIT}test_optimize_model_saves_and_loads_as_the_guide_does"
_IDLE_TEST = f"{_UNIT}test_keywords_of_optimize_model_without_meaning"
_ANY = f"{_UNIT}test_optimize_model_takes_any_module_and_pipeline"
NAMES = (
    Name("ipex_llm.optimize.optimize_model", "lowbit.optimize_model", WORKS, _ANY),
    Name("ipex_llm.optimize.optimize_model(low_bit=)", "lowbit.optimize_model", WORKS, _ANY),
    Name("ipex_llm.optimize.optimize_model(optimize_llm=)", "", IGNORED, _IDLE_TEST, KERNELS),
    Name("ipex_llm.optimize.optimize_model(modules_to_not_convert=)", "lowbit.optimize_model", WORKS, _ANY),
    Name(
        "ipex_llm.optimize.optimize_model(cpu_embedding=)",
        "lowbit.optimize_model",
        WORKS,
        f"{_UNIT}test_optimize_model_with_a_dense_embedding",
        "the embedding stays dense",
    ),
    *(
        Name(f"ipex_llm.optimize.optimize_model({name}=)", "", IGNORED, _IDLE_TEST, reason)
        for name, reason in IDLE.items()
    ),
    Name("ipex_llm.optimize.low_memory_init", "lowbit.low_memory_init", WORKS, _GUIDE),
    Name(
        "ipex_llm.optimize.load_low_bit", "lowbit.load_low_bit", WORKS, _GUIDE, "an old folder needs allow_pickle=True"
    ),
)
