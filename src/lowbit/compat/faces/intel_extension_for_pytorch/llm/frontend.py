"""`ipex.llm.optimize`: a language model in a type, or low-bit in one of four ways.

    dtype                                    fp32, bf16 or fp16, through the engine
    quantization_config for weights alone    linears packed, computing as its lowp_mode says
      + low_precision_checkpoint             linears as GPTQ or AWQ packed them
    quantization_config that is static       stage 1: the model that prepare takes
      + qconfig_summary_file                 stage 2: 8 bits for weights and activations, smoothed as the file says;
                                             a range that was edited there holds, elsewhere each row has its own scale
    quantization_config of Neural Compressor its recipe

Any torch module is taken, whether lowbit's engine knows its architecture or not: what it does not know runs in transformers' own
loop over low-bit layers. The copy that `inplace=False` makes shares all numbers that do not change.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowbit.checkpoint.layout import held_weights
from lowbit.checkpoint.ready_made import Packing, place_, read_folder, read_tensors
from lowbit.compat.faces.intel_extension_for_pytorch.frontend import check_module
from lowbit.compat.faces.intel_extension_for_pytorch.llm._timing import time_tokens_
from lowbit.compat.faces.intel_extension_for_pytorch.llm._traced import answer_as_traced_
from lowbit.compat.faces.intel_extension_for_pytorch.quantization import _qconfig as configs
from lowbit.compat.faces.intel_extension_for_pytorch.quantization._qconfig import StageError, WoqLowpMode
from lowbit.compat.faces.intel_extension_for_pytorch.quantization._quantize import dynamic_recipe
from lowbit.compat.faces.intel_extension_for_pytorch.quantization._weight_only import (
    compute_for,
    make_weight_only_,
    show_as_that_library_does_,
)
from lowbit.compat.ignored import say_ignored, say_once
from lowbit.compat.missing import refuse_unknown
from lowbit.compat.names import IGNORED, REFUSED, WORKS, Name
from lowbit.configs.base import WeightOnlyConfig
from lowbit.errors import RecipeError
from lowbit.interop.qconf_summary import read_summary
from lowbit.observed import find_model_groups, quantize_from_summary_
from lowbit.optimize import optimize_model, settle_
from lowbit.recipe import Recipe
from lowbit.swap import copy_model

_OWNER = "ipex.llm.optimize"
_CASTS = (torch.float32, torch.bfloat16, torch.float16)
_CACHED = (WoqLowpMode.BF16, WoqLowpMode.INT8)
# SmolLM2, smoothed with an alpha of 0.5: a KL of 0.010 by rows, of 0.057 by ranges; and the engine multiplies rows.
_ROWS_NOT_RANGES = (
    f"{_OWNER}: of the summary the smoothing is taken, and each row of activations gets a scale of its own, which is nearer to the "
    "original and faster than the ranges; a range that was edited there holds, and ipex.quantization.convert takes all of them"
)
# Tokens on which it is seen where smoothing folds, for a summary that does not say.
_PROBE = 32


def optimize(
    model: nn.Module,
    optimizer: Any = None,
    dtype: torch.dtype = torch.float,
    inplace: bool = False,
    device: str | torch.device = "cpu",
    quantization_config: Any = None,
    qconfig_summary_file: str | Path | None = None,
    low_precision_checkpoint: Any = None,
    sample_inputs: Any = None,
    deployment_mode: bool = True,
    cache_weight_for_large_batch: bool = False,
) -> nn.Module:
    """A language model made ready for inference."""
    check_module(_OWNER, model)
    if optimizer is not None:
        raise RecipeError(f"{_OWNER} is for inference: ipex.optimize(model, optimizer=optimizer) gives a pair to train")
    if dtype not in _CASTS:
        raise RecipeError(f"{_OWNER} computes in float32, bfloat16 or float16, not in {dtype}")
    _say_ignored(sample_inputs, deployment_mode)
    _check_stage(quantization_config, qconfig_summary_file, low_precision_checkpoint)
    _check_cache(cache_weight_for_large_batch, dtype, quantization_config)
    made = model if inplace else copy_model(model)
    made.eval()
    if held_weights(made):
        # Scripts of Neural Compressor hand on the configuration that the model was made with.
        if quantization_config is not None and not isinstance(quantization_config, WeightOnlyConfig):
            raise StageError(f"{_OWNER} was given a low-bit model and a quantization_config: leave the second out")
        made.to(dtype)
    elif isinstance(quantization_config, WeightOnlyConfig):
        recipe, calibration = quantization_config.to_recipe(), quantization_config.calibration()
        optimize_model(made, recipe=recipe, compute=quantization_config.compute, calibration=calibration)
        made.to(dtype)
    elif quantization_config is None:
        optimize_model(made.to(dtype), low_bit=None)
    else:
        settings = configs.settings_of(quantization_config, _OWNER)
        stage = _quantise(made, settings, quantization_config, qconfig_summary_file, low_precision_checkpoint, dtype)
        if stage is not None:
            return stage
    if str(device) != "cpu":
        made.to(device)
    return answer_as_traced_(time_tokens_(made), deployment_mode)


def optimize_transformers(model: nn.Module, *args: Any, woq: bool = False, **kwargs: Any) -> nn.Module:
    """`ipex.llm.optimize` under its first name; `woq` says that the model is low-bit already."""
    if woq and isinstance(model, nn.Module) and not held_weights(model) and kwargs.get("quantization_config") is None:
        raise StageError(
            "optimize_transformers(woq=True) takes a model whose weights are packed: load it with quantization_config=, or give "
            "quantization_config= here"
        )
    return optimize(model, *args, **kwargs)


def _quantise(
    made: nn.Module, settings: Any, configure: Any, summary: Any, checkpoint: Any, dtype: torch.dtype
) -> nn.Module | None:
    """Make a model low-bit in place; returns one only where nothing is to be done yet, in the first of two stages."""
    if configs.is_weight_only(settings):
        if checkpoint is not None:
            _place_checkpoint_(made.to(dtype), settings, checkpoint)
            return None
        make_weight_only_(made, settings, configs.left_out(configure), dtype)
    elif configs.is_dynamic(settings):
        optimize_model(made, recipe=dynamic_recipe())
    elif summary is None:
        return made.to(dtype)
    else:
        linears = read_summary(summary)
        unplaced = any(linear.factors and linear.place is None for linear in linears)
        groups = find_model_groups(made, (_probe_tokens(made),), {}) if unplaced else []
        say_once(_ROWS_NOT_RANGES)
        quantize_from_summary_(made, linears, groups, ranges=False)
    made.to(dtype)
    return None


def _place_checkpoint_(model: nn.Module, settings: Any, checkpoint: Any) -> None:
    """Put the linears of a checkpoint into a model, in place."""
    tensors, packing = _tensors_and_packing(checkpoint)
    if settings.group_size > 0 and packing.group_size is None:
        packing = replace(packing, group_size=settings.group_size)
    elif settings.group_size > 0 and packing.group_size != settings.group_size:
        raise StageError(
            f"the checkpoint says groups of {packing.group_size} and the configuration group_size={settings.group_size}: "
            f"say group_size={packing.group_size}, or leave it out"
        )
    format = configs.format_of(settings)
    report = place_(model, tensors, replace(packing, bits=format.bits))
    recipe = Recipe(format, name=report.recipe)
    settle_(model, report, recipe, compute=compute_for(model, settings))
    show_as_that_library_does_(model, settings)


def _tensors_and_packing(checkpoint: Any) -> tuple[Mapping[str, torch.Tensor], Packing]:
    """A state dict, one with its configuration beside it, or the place of either."""
    if isinstance(checkpoint, str | Path):
        place = Path(checkpoint).expanduser()
        if place.is_file():
            return read_tensors(place), Packing()
        tensors, config = read_folder(place)
        return tensors, Packing.of(config)
    if isinstance(checkpoint, tuple | list) and len(checkpoint) == 2:
        tensors, config = checkpoint
        return tensors, Packing.of(config if isinstance(config, Mapping) else {"quant_method": config})
    if isinstance(checkpoint, Mapping):
        return checkpoint, Packing()
    raise StageError(
        f"low_precision_checkpoint is a state dict, or a pair of it and what it is packed by, not a {type(checkpoint).__name__}"
    )


def _probe_tokens(model: Any) -> torch.Tensor:
    size = int(getattr(model.get_input_embeddings(), "num_embeddings", _PROBE))
    return (torch.arange(_PROBE) % size)[None]


def _check_stage(configure: Any, summary: Any, checkpoint: Any) -> None:
    """Refuse what belongs to another way or stage."""
    if configure is None:
        for name, value in (("qconfig_summary_file", summary), ("low_precision_checkpoint", checkpoint)):
            if value is not None:
                raise StageError(f"{name} needs the quantization_config that it was made with")
        return
    if isinstance(configure, WeightOnlyConfig):
        given = summary is not None or checkpoint is not None
        if given:
            raise StageError(f"a {type(configure).__name__} says everything by itself: leave files and checkpoints out")
        return
    settings = configs.settings_of(configure, _OWNER)
    ranges = not configs.is_weight_only(settings) and not configs.is_dynamic(settings)
    if summary is not None and not ranges:
        raise StageError(
            "qconfig_summary_file holds ranges of activations, and this quantization_config rounds none to ranges: give the "
            "one of get_smooth_quant_qconfig_mapping, or leave the file out"
        )
    if checkpoint is not None and not configs.is_weight_only(settings):
        raise StageError(
            "low_precision_checkpoint holds packed weights, and this quantization_config is not for weights alone: give the one "
            "of get_weight_only_quant_qconfig_mapping"
        )


def _check_cache(wanted: bool, dtype: torch.dtype, configure: Any) -> None:
    if not wanted:
        return
    lowp = getattr(getattr(configure, "global_qconfig", configure), "lowp_mode", None)
    if dtype != torch.bfloat16 and lowp not in _CACHED:
        raise StageError("cache_weight_for_large_batch is for bf16, or a lowp_mode of BF16 or INT8")
    say_ignored(_OWNER, "cache_weight_for_large_batch", "one form of each weight serves every batch")


def _say_ignored(sample_inputs: Any, deployment_mode: bool) -> None:
    if sample_inputs is not None:
        say_ignored(_OWNER, "sample_inputs", "nothing is traced")
    if not deployment_mode:
        say_ignored(_OWNER, "deployment_mode", "nothing is traced in any case, and the model stays an ordinary module")


__getattr__ = refuse_unknown(__name__, {})

_PLACE = "intel_extension_for_pytorch.llm.optimize"
_TESTS = "tests/unit/test_compat_ipex_llm.py::"
_CONTRADICTS = f"{_TESTS}test_what_contradicts_itself"
_REMARKS = {
    "qconfig_summary_file": "its smoothing and the ranges that were edited there; elsewhere each row of activations has its scale"
}
_ONE_FORM = "one form of each weight serves every batch"
NAMES = (
    Name(_PLACE, "lowbit.optimize_model", WORKS, f"{_TESTS}test_three_types"),
    Name(
        "intel_extension_for_pytorch.optimize_transformers",
        "lowbit.optimize_model",
        WORKS,
        f"{_TESTS}test_low_bit_models_are_taken_as_they_are",
    ),
    Name(
        "intel_extension_for_pytorch.optimize_transformers(woq=)",
        "",
        WORKS,
        f"{_TESTS}test_low_bit_models_are_taken_as_they_are",
        "of a model that is low-bit",
    ),
    *(
        Name(f"{_PLACE}({name}=)", "", WORKS, f"{_TESTS}{test}", _REMARKS.get(name, ""))
        for name, test in (
            ("dtype", "test_three_types"),
            ("inplace", "test_three_types"),
            ("device", "test_three_types"),
            ("quantization_config", "test_weights_alone"),
            ("qconfig_summary_file", "test_two_stages_of_a_language_model"),
            ("low_precision_checkpoint", "test_checkpoints_that_others_packed"),
        )
    ),
    Name(f"{_PLACE}(optimizer=)", "", REFUSED, _CONTRADICTS, "ipex.optimize(model, optimizer=)"),
    Name(f"{_PLACE}(sample_inputs=)", "", IGNORED, f"{_TESTS}test_three_types", "nothing is traced"),
    Name(f"{_PLACE}(deployment_mode=)", "", IGNORED, f"{_TESTS}test_three_types", "nothing is traced"),
    Name(f"{_PLACE}(cache_weight_for_large_batch=)", "", IGNORED, _CONTRADICTS, _ONE_FORM),
)
