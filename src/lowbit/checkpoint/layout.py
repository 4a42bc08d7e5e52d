"""Where the packed weights of a model are, and what each is called.

A `Held` is one packed weight at one place. A head tied to its embedding is two places with one weight: the second says
`tied_to`. The path of a linear, an embedding or a convolution is that of its module; a module of experts holds two
weights and each has the path that its dense parameter had (`...experts.gate_up_proj`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from lowbit.layers import LowBitConv, LowBitEmbedding, LowBitExperts, LowBitLinear, PackedWeight


@dataclass(frozen=True)
class Held:
    """A packed weight where a module holds it."""

    path: str
    module: nn.Module
    weight: PackedWeight
    tied_to: str | None = None

    @property
    def role(self) -> str:
        return next(role for kind, role in _ROLES.items() if isinstance(self.module, kind))


_ROLES: dict[type[nn.Module], str] = {
    LowBitExperts: "experts",
    LowBitEmbedding: "embedding",
    LowBitConv: "conv",
    LowBitLinear: "linear",
}


def held_weights(model: nn.Module) -> list[Held]:
    """Every place of a model that holds a packed weight, in the order of the model."""
    owners: dict[int, str] = {}
    found = []
    for path, module in model.named_modules():
        if not isinstance(module, LowBitExperts | LowBitEmbedding | LowBitConv | LowBitLinear):
            continue
        for name, child in module.named_children():
            if isinstance(child, PackedWeight):
                place = path if name == "packed_weight" else f"{path}.{name}"
                owner = owners.setdefault(id(child), place)
                found.append(Held(place, module, child, None if owner == place else owner))
    return found


def stands_for(module: nn.Module) -> str:
    """The class that a low-bit module took the place of."""
    return str(getattr(module, "stands_for", "Linear"))


def dense_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of a model's state that is not a packed weight, shared ones once."""
    seen: set[int] = set()
    for path, module in model.named_modules():
        if isinstance(module, PackedWeight):
            continue
        kept = [(n, b) for n, b in module._buffers.items() if n not in module._non_persistent_buffers_set]
        for name, tensor in [*module._parameters.items(), *kept]:
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                yield f"{path}.{name}" if path else name, tensor.detach()


def dense_modules(model: nn.Module) -> list[str]:
    """The modules with a weight matrix that were left as they are: linears, embeddings, routers."""
    return [p for p, m in model.named_modules() if getattr(m._parameters.get("weight"), "ndim", 0) == 2]
