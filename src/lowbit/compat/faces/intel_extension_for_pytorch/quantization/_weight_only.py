"""Weights alone: a model's linears in the format of a configuration, computing as its `lowp_mode` says.

    NONE    in the type of the activations        FP16, BF16   both sides rounded to it, sums in fp32
    INT8    activations rounded to 8 bits, integer products

The core rounds each row of activations with a scale for each group of the weight (PER_BATCH_IC_BLOCK_SYM). The other ways to round
them are done before the product, which is then made in fp32: the numbers are those of integers. Such layers are run by torch's own
loop, since the engine would pass the rounding by.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from lowbit.compat.faces.intel_extension_for_pytorch.nn.modules.weight_only_quantization import (
    WeightOnlyQuantizedLinear,
)
from lowbit.compat.faces.intel_extension_for_pytorch.quantization import _qconfig as configs
from lowbit.compat.faces.intel_extension_for_pytorch.quantization._qconfig import WoqActQuantMode, WoqLowpMode
from lowbit.compat.ignored import say_once
from lowbit.formats import as_format
from lowbit.layers import LowBitLinear
from lowbit.models.walk import find_targets
from lowbit.optimize import optimize_model
from lowbit.recipe import Recipe
from lowbit.swap import replace_module

# The rounding of the core itself.
_NATIVE = WoqActQuantMode.PER_BATCH_IC_BLOCK_SYM
_FIRST_SYMMETRIC = WoqActQuantMode.PER_TENSOR_SYM
_LEAST = 1e-12
# That library leaves embeddings in full precision. Where the head is the embedding, the bits of a linear are too few for both:
# SmolLM2 in groups of 64 is at a KL of 0.517 (INT4) and 0.500 (NF4) with 4 bits there, of 0.328 and 0.270 with 8.
_HEAD = as_format("int8")
_TIED = "head and embedding are one weight, which has 8 bits"


def make_weight_only_(
    model: nn.Module, settings: Any, left: Sequence[str] = (), dtype: torch.dtype | None = None
) -> nn.Module:
    """Pack the linears of a model in place, as a configuration for weights alone says; `dtype`: what activations will be in."""
    format = configs.format_of(settings)
    recipe = Recipe(format, head=format, skip=tuple(left), name=f"{format} for weights alone")
    tied = [target for target in find_targets(model) if target.tied_to or target.role == "head"]
    if format.bits < _HEAD.bits and any(target.tied_to for target in tied):
        notes = tuple(
            (f"^{re.escape(name)}$", _TIED) for target in tied for name in (target.path, target.tied_to or "")
        )
        recipe = recipe.replace(head=_HEAD, notes=notes)
    optimize_model(model, recipe=recipe, compute=compute_for(model, settings, dtype))
    show_as_that_library_does_(model, settings)
    return model


def compute_for(model: nn.Module, settings: Any, dtype: torch.dtype | None = None) -> str:
    """What the products of a model are computed in."""
    if rounding_of(settings) is not None:
        return "fp32"
    return configs.compute_of(settings, dtype or next((p.dtype for p in model.parameters()), torch.float32))


def show_as_that_library_does_(model: nn.Module, settings: Any) -> None:
    """Low-bit linears under that library's class, over the same weights, and their inputs rounded as the mode says."""
    rounding = rounding_of(settings)
    for path, module in list(model.named_modules()):
        if type(module) is LowBitLinear:
            shown = WeightOnlyQuantizedLinear.over(module, settings)
            replace_module(model, path, shown)
            if rounding is not None:
                size = shown.packed_weight.format.group_size
                shown.register_forward_pre_hook(partial(_round_inputs, rounding, size))
    if rounding is not None:
        mode = WoqActQuantMode(settings.act_quant_mode).name
        say_once(
            f"act_quant_mode={mode} is computed with the numbers of integers and the speed of floats: "
            f"the default, {_NATIVE.name}, is what kernels do by themselves"
        )


def rounding_of(settings: Any) -> Callable[..., torch.Tensor] | None:
    """The way activations are rounded before the product; None where the kernel does it, or nobody."""
    if settings.lowp_mode != WoqLowpMode.INT8 or settings.act_quant_mode in (_NATIVE, WoqActQuantMode.NONE):
        return None
    return partial(round_activations, WoqActQuantMode(settings.act_quant_mode))


def _round_inputs(
    rounding: Callable[..., torch.Tensor], group_size: int, module: nn.Module, args: tuple[Any, ...]
) -> tuple[Any, ...]:
    return (rounding(args[0], group_size), *args[1:])


def round_activations(mode: WoqActQuantMode, x: torch.Tensor, group_size: int) -> torch.Tensor:
    """x [.., in] as 8-bit codes would hold it, with a scale for what the mode names: everything, a block of inputs over all
    rows, a row, or a block of a row."""
    rows = x.detach().reshape(-1, x.shape[-1]).float()
    width = rows.shape[1]
    block = group_size if 0 < group_size < width else width
    padded = nn.functional.pad(rows, (0, -width % block))
    blocks = padded.view(len(rows), -1, block)
    symmetric = mode >= _FIRST_SYMMETRIC
    kind = mode - _FIRST_SYMMETRIC if symmetric else int(mode)
    over = {0: (0, 1, 2), 1: (0, 2), 2: (1, 2), 3: (2,)}[kind]
    if symmetric:
        scale = blocks.abs().amax(over, keepdim=True).clamp_min(_LEAST) / 127
        rounded = (blocks / scale).round() * scale
    else:
        low, high = blocks.amin(over, keepdim=True).clamp_max(0), blocks.amax(over, keepdim=True).clamp_min(0)
        scale = ((high - low) / 255).clamp_min(_LEAST)
        zero = (-low / scale).round()
        rounded = (((blocks / scale).round() + zero).clamp(0, 255) - zero) * scale
    return rounded.view(len(rows), -1)[:, :width].reshape(x.shape).to(x.dtype)
