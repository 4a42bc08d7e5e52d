"""Put low-bit modules in the place of dense ones, in a model or in a copy of it that shares its numbers."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from lowbit.layers import LowBitConv, LowBitEmbedding, LowBitExperts, LowBitLinear, PackedWeight
from lowbit.models.walk import Target, gate_of, up_name

# Hooks that somebody put on a module hold for the one in its place.
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)


def low_bit_module(target: Target, weights: list[PackedWeight]) -> nn.Module:
    """The module that takes a target's place. `stands_for` names the class it replaces: a saved form depends on it."""
    new = _low_bit_module(target, weights)
    new.stands_for = type(target.module).__name__  # type: ignore[assignment]
    return new


def _low_bit_module(target: Target, weights: list[PackedWeight]) -> nn.Module:
    module: Any = target.module
    if target.role == "embedding":
        # Gemma keeps its scale twice: as a buffer, which has no value while a model is being loaded, and as a number.
        scale = float(getattr(module, "scalar_embed_scale", getattr(module, "embed_scale", 1.0)))
        return LowBitEmbedding(weights[0], module.padding_idx, scale)
    if target.role == "conv":
        return LowBitConv(weights[0], module)
    if target.role == "experts":
        return _experts(module, weights)
    return LowBitLinear(weights[0], module.bias)


def copy_model(model: nn.Module) -> nn.Module:
    """A model of its own over the same numbers: what is replaced or cast in one stays in the other, and nothing is held twice.

    What is written into a parameter in place is written into both.
    """
    shared: dict[int, Any] = {
        id(p): nn.Parameter(p.detach(), requires_grad=p.requires_grad)
        for p in model.parameters()
        if type(p) is nn.Parameter
    }
    for module in model.modules():
        if isinstance(module, PackedWeight):
            shared |= {id(tensor): tensor for tensor in module.tensors.values()}
    return copy.deepcopy(model, shared)


def replace_module(model: nn.Module, path: str, new: nn.Module) -> None:
    """Put a module in the place of another."""
    parent, _, name = path.rpartition(".")
    old = model.get_submodule(path)
    new.train(old.training)
    for hooks in _HOOKS:
        getattr(new, hooks).update(getattr(old, hooks))
    setattr(model.get_submodule(parent), name, new)


def _experts(module: Any, weights: list[PackedWeight]) -> LowBitExperts:
    up = up_name(module)
    biases = [getattr(module, f"{name}_bias", None) for name in (up, "down_proj")]
    gate = gate_of(module)
    # What is left of the original once its weights are gone still knows the activation and its limits.
    for name in list(module._parameters):
        del module._parameters[name]
    return LowBitExperts(weights[0], weights[1], gate, biases[0], biases[1], up)
