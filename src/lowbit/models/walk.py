"""Walk a model: find every weight that can be packed, and say which role it plays.

A `Target` is one weight. Roles decide which format a recipe gives it:

    linear      nn.Linear, and the transposed Conv1D of GPT-2
    head        the linear that makes logits
    embedding   a lookup table
    conv        nn.Conv1d/2d/3d
    experts     the fused 3-D experts of transformers 5 (two weights in one module)

A router that picks experts is left alone (`is_router`): rounding it changes which experts run, for a handful of
weights saved.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

Role = Literal["linear", "head", "embedding", "conv", "experts"]
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
# What a subclass overrides to compute something else.
_COMPUTING = ("forward", "_conv_forward")
# The module itself, tokens, indices and shares.
_EXPERT_INPUTS = 4
_EXPERT_UP_NAMES = ("gate_up_proj", "up_proj")
# Subclasses of nn.Linear whose own forward computes what nn.Linear's does.
_SPELT_OUT = ("FalconLinear",)
# Names that transformers' families give to the linear that routes tokens to experts.
_ROUTER_NAMES = ("gate", "router", "shared_expert_gate")


@dataclass(frozen=True)
class Target:
    """A module whose weight can be packed. `tied_to` names the module that owns the weight when it is shared."""

    path: str
    role: Role
    module: nn.Module
    tied_to: str | None = None


def find_targets(model: nn.Module) -> list[Target]:
    """Every module of a model whose weight can be packed, in the order of the model."""
    head = _call(model, "get_output_embeddings")
    owners: dict[int, str] = {}
    targets = []
    for path, module in model.named_modules(remove_duplicate=False):
        role = _role(module, head)
        if role is None:
            continue
        weight = None if role == "experts" else module.weight
        owner = None if weight is None else owners.setdefault(id(weight), path)
        targets.append(Target(path, role, module, None if owner in (None, path) else owner))
    return targets


def is_router(path: str, module: nn.Module) -> bool:
    """Whether a linear chooses experts."""
    return path.rpartition(".")[2] in _ROUTER_NAMES and getattr(module, "out_features", 1 << 30) <= 1024


def keeps_dense(module: nn.Module) -> str:
    """Why a module of a known kind cannot be packed, because its weight is more than a matrix that stays; else empty."""
    if getattr(module, "max_norm", None) is not None:
        return "it shortens its rows as they are looked up (max_norm)"
    if hasattr(module, "weight") and "weight" not in module._parameters and "weight" not in module._buffers:
        return "its weight is made anew before each call (weight norm, pruning): make it permanent first"
    return ""


def dense_weights(target: Target) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights of a target, each as [.., out, in] with the suffix of its name: one, or two for experts."""
    module: Any = target.module
    if target.role == "experts":
        for name in (up_name(module), "down_proj"):
            yield name, stored_order(target, getattr(module, name))
    else:
        yield "weight", stored_order(target, module.weight)


def stored_order(target: Target, weight: torch.Tensor) -> torch.Tensor:
    """A weight of a target as [.., out, in], the order in which it is packed."""
    if target.role == "experts":
        return weight.transpose(-1, -2) if getattr(target.module, "is_transposed", False) else weight
    if target.role == "conv":
        return weight.flatten(1)
    return weight.t() if _is_conv1d(target.module) else weight


def _role(module: nn.Module, head: nn.Module | None) -> Role | None:
    if "packed_weight" in module._modules:
        return None
    if _is_plain(module, (nn.Linear,)) or type(module).__name__ in _SPELT_OUT:
        return "head" if module is head else "linear"
    if _is_conv1d(module):
        return "linear"
    if isinstance(module, nn.Embedding) and not _offset_positions(module):
        return "embedding"
    if _is_plain(module, _CONVS):
        return "conv"
    return "experts" if _is_experts(module) else None


def _is_conv1d(module: nn.Module) -> bool:
    """GPT-2's Conv1D: a linear whose weight is stored [in, out]."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def _offset_positions(module: nn.Module) -> bool:
    """Embeddings with a forward of their own that is more than a lookup and a scale (learned positions with an offset)."""
    return type(module) is not nn.Embedding and not hasattr(module, "embed_scale")


def _is_plain(module: nn.Module, kinds: tuple[type[nn.Module], ...]) -> bool:
    """Whether a module computes what torch's own kinds do: a subclass with a forward of its own may do more."""
    own = [getattr(type(module), name, None) for name in _COMPUTING]
    return any(isinstance(module, kind) and own == [getattr(kind, name, None) for name in _COMPUTING] for kind in kinds)


def _is_experts(module: nn.Module) -> bool:
    """Fused experts that are called as transformers 5 does: with tokens, which experts each has, and their shares."""
    weights = [getattr(module, name, None) for name in ("down_proj", up_name(module))]
    if not all(isinstance(w, torch.Tensor) and w.dim() == 3 for w in weights):
        return False
    gates = hasattr(module, "_apply_gate") or (up_name(module) == "up_proj" and hasattr(module, "act_fn"))
    return gates and len(inspect.signature(type(module).forward).parameters) == _EXPERT_INPUTS


def up_name(module: nn.Module) -> str:
    return next((name for name in _EXPERT_UP_NAMES if getattr(module, name, None) is not None), _EXPERT_UP_NAMES[0])


def gate_of(module: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """What fused experts do between their two products."""
    gate: Callable[[torch.Tensor], torch.Tensor]
    gate = partial(type(module)._apply_gate, module) if up_name(module) == "gate_up_proj" else module.act_fn
    return gate


def _call(model: nn.Module, name: str) -> nn.Module | None:
    method = getattr(model, name, None)
    result = method() if callable(method) else None
    return result if isinstance(result, nn.Module) else None
