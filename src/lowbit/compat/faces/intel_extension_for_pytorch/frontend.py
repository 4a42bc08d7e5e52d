"""`ipex.optimize` for any model, with an optimizer or without, and the switches of that library's runtime."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import IntEnum
from typing import Any

import torch
from torch import nn

from lowbit.checkpoint.hf_names import is_transformers_model
from lowbit.checkpoint.layout import held_weights
from lowbit.compat.ignored import say_ignored, say_once
from lowbit.compat.missing import refuse_unknown
from lowbit.compat.names import IGNORED, WORKS, Name
from lowbit.errors import RecipeError
from lowbit.optimize import optimize_model
from lowbit.swap import copy_model

_OWNER = "ipex.optimize"
_KERNELS = "kernels are chosen by torch and by lowbit, layer by layer"
_FOLDING = "torch.compile folds what can be folded"
_MASTERS = "weights stay in the type that they have, and autocast computes in the other"
_IGNORED = {
    "level": "there is one way",
    "conv_bn_folding": _FOLDING,
    "linear_bn_folding": _FOLDING,
    "weights_prepack": _KERNELS,
    "replace_dropout_with_identity": "a dropout does nothing in a model that evaluates",
    "optimize_lstm": _KERNELS,
    "split_master_weight_for_bf16": _MASTERS,
    "fuse_update_step": "torch's optimizers take fused=True and foreach=True themselves",
    "auto_kernel_selection": _KERNELS,
    "sample_input": "nothing is traced",
    "graph_mode": "torch.compile makes a graph",
    "concat_linear": _KERNELS,
    "use_optimized_kernels": _KERNELS,
}
_CASTS = (torch.float32, torch.bfloat16, torch.float16)
# What is cast where inputs may be of another type: autocast brings them along, and norms keep their precision.
_MULTIPLYING = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def optimize(
    model: nn.Module,
    dtype: torch.dtype | None = None,
    optimizer: Any = None,
    level: str | None = None,
    inplace: bool = False,
    conv_bn_folding: bool | None = None,
    linear_bn_folding: bool | None = None,
    weights_prepack: bool | None = None,
    replace_dropout_with_identity: bool | None = None,
    optimize_lstm: bool | None = None,
    split_master_weight_for_bf16: bool | None = None,
    fuse_update_step: bool | None = None,
    auto_kernel_selection: bool | None = None,
    sample_input: Any = None,
    graph_mode: bool | None = None,
    concat_linear: bool | None = None,
    **others: Any,
) -> Any:
    """A model in `dtype`; with an optimizer a pair of both, to be trained under autocast. Language models get lowbit's engine."""
    switches = {
        "level": level if level != "O1" else None,
        "conv_bn_folding": conv_bn_folding,
        "linear_bn_folding": linear_bn_folding,
        "weights_prepack": weights_prepack,
        "replace_dropout_with_identity": replace_dropout_with_identity,
        "optimize_lstm": optimize_lstm,
        "split_master_weight_for_bf16": split_master_weight_for_bf16,
        "fuse_update_step": fuse_update_step,
        "auto_kernel_selection": auto_kernel_selection,
        "sample_input": sample_input,
        "graph_mode": graph_mode,
        "concat_linear": concat_linear,
    }
    say_switches(_OWNER, switches | others, _IGNORED)
    check_module(_OWNER, model)
    if dtype is not None and dtype not in _CASTS:
        raise RecipeError(f"{_OWNER} computes in float32, bfloat16 or float16, not in {dtype}")
    if optimizer is not None or model.training:
        if dtype in (torch.bfloat16, torch.float16):
            say_once(f"{_OWNER}: {_MASTERS}: with torch.autocast(..., dtype={dtype}): around the forward")
        return model if optimizer is None else (model, optimizer)
    if held_weights(model):
        return model if dtype is None else model.to(dtype)
    made = model if inplace else copy_model(model)
    if is_transformers_model(made):
        made = made if dtype is None else made.to(dtype)
        return optimize_model(made, low_bit=None)
    if dtype is not None:
        for module in made.modules():
            if isinstance(module, _MULTIPLYING):
                module.to(dtype)
    return made


def fast_bert(model: nn.Module, dtype: torch.dtype = torch.float, optimizer: Any = None, unpad: bool = False) -> Any:
    """What `optimize` does, under the name that models like BERT had it by."""
    if unpad:
        say_ignored("ipex.fast_bert", "unpad", "padding is left to the model's attention mask")
    return optimize(model, dtype=dtype, optimizer=optimizer)


def say_switches(owner: str, given: Mapping[str, Any], reasons: Mapping[str, str]) -> None:
    """Name each switch that somebody set and that does nothing."""
    for name, value in given.items():
        if value is None:
            continue
        if name not in reasons:
            raise TypeError(f"{owner} has no parameter {name!r}")
        say_ignored(owner, name, reasons[name])


def check_module(owner: str, model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise RecipeError(f"{owner} takes a torch module, not a {type(model).__name__}")


class FP32MathMode(IntEnum):
    """How products of fp32 may be computed."""

    FP32 = 0
    TF32 = 1
    BF32 = 2


_PRECISIONS = {FP32MathMode.FP32: "highest", FP32MathMode.TF32: "high", FP32MathMode.BF32: "medium"}


def set_fp32_math_mode(mode: FP32MathMode = FP32MathMode.FP32, device: str = "cpu") -> None:
    """torch's own switch for it."""
    torch.set_float32_matmul_precision(_PRECISIONS[FP32MathMode(mode)])


def get_fp32_math_mode(device: str = "cpu") -> FP32MathMode:
    found = torch.get_float32_matmul_precision()
    return next(mode for mode, name in _PRECISIONS.items() if name == found)


def set_logging_level(level: str | int) -> None:
    """How much lowbit says."""
    name = level.upper() if isinstance(level, str) else level
    logging.getLogger("lowbit").setLevel(name)


def _set_optimized_model_for_generation(model: nn.Module, optimized_model: Any, *_: Any, **__: Any) -> nn.Module:
    """Nothing is traced: the model generates by itself."""
    say_ignored("ipex._set_optimized_model_for_generation", "optimized_model", "nothing is traced")
    return model


@contextmanager
def OnDevice(
    dtype: torch.dtype = torch.float32, device: str | torch.device = "meta", enabled: bool = True
) -> Iterator[None]:
    """Models that are made inside are of this type and on this device."""
    if not enabled:
        yield
        return
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


_MEMORY_FORMAT = "the memory format is the model's: model.to(memory_format=...)"


def enable_auto_channels_last() -> None:
    say_ignored("ipex", "enable_auto_channels_last", _MEMORY_FORMAT)


def disable_auto_channels_last() -> None:
    """It is never on."""


def enable_onednn_fusion(enabled: bool = True) -> None:
    say_ignored("ipex", "enable_onednn_fusion", "torch.compile fuses")


@contextmanager
def verbose(level: int = 0) -> Iterator[None]:
    """torch's own report of its oneDNN kernels."""
    with torch.backends.mkldnn.verbose(level):  # type: ignore[no-untyped-call]
        yield


def version() -> None:
    """Say who answers."""
    import lowbit

    print(f"intel_extension_for_pytorch, answered by lowbit {lowbit.__version__} on torch {torch.__version__}")


__getattr__ = refuse_unknown(__name__, {})

_PLACE = "intel_extension_for_pytorch"
_UNIT = "tests/unit/test_compat_ipex.py::"
NAMES = (
    Name(f"{_PLACE}.optimize", "lowbit.optimize_model", WORKS, f"{_UNIT}test_optimize_of_any_model"),
    Name(f"{_PLACE}.optimize(optimizer=)", "", WORKS, f"{_UNIT}test_optimize_with_an_optimizer_is_a_pair"),
    Name(f"{_PLACE}.optimize(inplace=)", "", WORKS, f"{_UNIT}test_optimize_of_any_model"),
    *(
        Name(f"{_PLACE}.optimize({name}=)", "", IGNORED, f"{_UNIT}test_each_switch", reason)
        for name, reason in _IGNORED.items()
    ),
    Name(f"{_PLACE}.fast_bert", "lowbit.optimize_model", WORKS, f"{_UNIT}test_small_names"),
    Name(f"{_PLACE}.set_fp32_math_mode", "", WORKS, f"{_UNIT}test_small_names", "torch.set_float32_matmul_precision"),
    Name(f"{_PLACE}.get_fp32_math_mode", "", WORKS, f"{_UNIT}test_small_names"),
    Name(f"{_PLACE}.FP32MathMode", "", WORKS, f"{_UNIT}test_small_names"),
    Name(f"{_PLACE}.set_logging_level", "", WORKS, f"{_UNIT}test_small_names"),
    Name(f"{_PLACE}.OnDevice", "", WORKS, f"{_UNIT}test_small_names", "torch.device as a context"),
    Name(f"{_PLACE}.verbose", "", WORKS, f"{_UNIT}test_small_names", "torch.backends.mkldnn.verbose"),
    Name(f"{_PLACE}.version", "", WORKS, f"{_UNIT}test_small_names"),
    Name(
        f"{_PLACE}._set_optimized_model_for_generation", "", IGNORED, f"{_UNIT}test_small_switches", "nothing is traced"
    ),
    Name(f"{_PLACE}.enable_auto_channels_last", "", IGNORED, f"{_UNIT}test_small_switches", _MEMORY_FORMAT),
    Name(f"{_PLACE}.disable_auto_channels_last", "", WORKS, f"{_UNIT}test_small_names", "it is never on"),
    Name(f"{_PLACE}.enable_onednn_fusion", "", IGNORED, f"{_UNIT}test_small_switches", "torch.compile fuses"),
)
