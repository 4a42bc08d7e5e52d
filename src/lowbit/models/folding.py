"""Folding: a scale moved from one weight into those that read its output, which leaves the function as it was.

    y = L (p(x))  =  (L s) (p(x) / s)          s > 0, one number for each channel between p and L

p is a norm or a linear, `previous`; the linears are all the weights that read its output. `folded` gives the changed
parameters by name, for a trial; `fold_scale_` writes them. Which weights belong together is found in `groups.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn

from lowbit.models.walk import Role, Target, stored_order


@dataclass(frozen=True, eq=False)
class ScalingGroup:
    """Weights that one scale [in] is moved into. Names are those of the report, from the block on.

    `others` read the same input and are scaled along without being packed (a router). `offset` is 1 where the norm
    multiplies by 1 + w. `rows` [in] names the row of `previous` behind each channel, which several channels may share;
    None: each its own. The scale of experts' weights [experts, out, in] is [experts, in].
    """

    linears: tuple[str, ...]
    previous: str
    others: tuple[str, ...] = ()
    offset: float = 0.0
    rows: torch.Tensor | None = None
    experts: int = 0

    @property
    def consumers(self) -> tuple[str, ...]:
        return self.linears + self.others

    def tie(self, scale: torch.Tensor) -> torch.Tensor:
        """A positive scale [.., in] with one value, the geometric mean, for channels that share a row.

        Each mean is a sum along an axis, forwards and in its gradient: sums that are scattered end differently from run to run on
        a GPU, and a search that goes by a scale then goes elsewhere (docs/notes/calibration.md).
        """
        if self._sharing is None or self.rows is None:
            return scale
        channels, own = (part.to(scale.device) for part in self._sharing)
        logs = torch.where(own, scale.log()[..., channels], 0.0)
        mean = logs.sum(-1) / own.sum(-1).clamp_min(1)
        return mean.exp()[..., self.rows.to(scale.device)]

    @cached_property
    def _sharing(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The channels of each row [rows, most], and which of these places are taken; None where no row has several."""
        if self.rows is None:
            return None
        count = torch.bincount(self.rows)
        most = int(count.max())
        if most < 2:
            return None
        places = torch.arange(most, device=count.device)
        order = torch.argsort(self.rows, stable=True)
        first = count.cumsum(0) - count
        return order[(first[:, None] + places).clamp_max(len(order) - 1)], places < count[:, None]

    def factors(self, scale: torch.Tensor, rows: int) -> torch.Tensor:
        """What each row of `previous` is divided by."""
        if self.rows is None:
            return scale
        factors = scale.new_ones((*scale.shape[:-1], rows))
        return factors.scatter(-1, self.rows.to(scale.device).expand(scale.shape), scale)


@dataclass(frozen=True)
class Holder:
    """A weight of a block: the module that has it, the name of its parameter, and its order."""

    name: str
    parameter: str
    bias: str | None
    target: Target

    def read(self) -> torch.Tensor:
        """The weight as [.., out, in], or [out] for a norm: a view of the parameter."""
        weight: torch.Tensor = getattr(self.target.module, self.parameter.rpartition(".")[2])
        return self.turn(weight)

    def read_bias(self) -> torch.Tensor | None:
        return getattr(self.target.module, self.bias.rpartition(".")[2]) if self.bias else None

    def turn(self, weight: torch.Tensor) -> torch.Tensor:
        """From the order of the parameter to [.., out, in], and back."""
        return weight if weight.dim() == 1 else stored_order(self.target, weight)


def find_holder(block: nn.Module, name: str) -> Holder:
    """The weight that a name of the report means."""
    modules = dict(block.named_modules())
    path, parameter = (name, "weight") if name in modules else (name.rpartition(".")[0], name.rpartition(".")[2])
    module = modules[path]
    bias_name = "bias" if parameter == "weight" else f"{parameter}_bias"
    bias = getattr(module, bias_name, None)
    weight: torch.Tensor = getattr(module, parameter)
    role: Role = "experts" if weight.dim() == 3 else "linear"
    full = f"{path}.{parameter}" if path else parameter
    return Holder(
        name,
        full,
        full.removesuffix(parameter) + bias_name if isinstance(bias, torch.Tensor) else None,
        Target(path, role, module),
    )


def folded(block: nn.Module, group: ScalingGroup, scale: torch.Tensor) -> dict[str, torch.Tensor]:
    """The parameters of a block that folding a scale [in] (experts: [experts, in]) changes, by name."""
    holder = find_holder(block, group.previous)
    weight, bias = holder.read(), holder.read_bias()
    scale = scale.float().to(weight.device)
    norm = weight.dim() == 1
    factors = group.factors(scale, weight.shape[0 if norm else -2])
    divided = ((weight.float() + group.offset) / (factors if norm else factors.unsqueeze(-1)) - group.offset).to(
        weight.dtype
    )
    if (
        norm
    ):  # the scale that the norm can express in its type is the one that the linears take, so nothing is lost there
        kept = (divided.float() + group.offset) != 0
        expressed = (weight.float() + group.offset) / torch.where(kept, divided.float() + group.offset, 1.0)
        scale = factors = torch.where(kept, expressed, scale)
    changed = {holder.parameter: holder.turn(divided)}
    if bias is not None and holder.bias:
        changed[holder.bias] = (bias.float() / factors).to(bias.dtype)
    return changed | multiplied(block, group.consumers, scale)


def multiplied(block: nn.Module, names: tuple[str, ...], scale: torch.Tensor) -> dict[str, torch.Tensor]:
    """Weights with their columns multiplied, by the names of their parameters."""
    changed = {}
    for name in names:
        holder = find_holder(block, name)
        weight = holder.read()
        columns = scale.float().to(weight.device)
        scaled = weight.float() * (columns.unsqueeze(-2) if columns.dim() > 1 else columns)
        changed[holder.parameter] = holder.turn(scaled.to(weight.dtype))
    return changed


@torch.no_grad()
def fold_scale_(block: nn.Module, group: ScalingGroup, scale: torch.Tensor) -> None:
    """Move a scale [in] (experts: [experts, in]) from the previous module into the weights behind it, in place."""
    parameters = dict(block.named_parameters(remove_duplicate=False))
    for name, changed in folded(block, group, scale).items():
        parameters[name].copy_(changed)
