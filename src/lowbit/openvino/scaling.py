"""AWQ in a graph: products that share an input share a scale s [in], and the graph gives them x / s.

    y = x W^T = (x / s) (W s)^T

The scale with the least error of the products' outputs is kept, over some rows of what the graph was given, rounded as it is asked
for: the same search as of a torch model (`algorithms.awq`). Where x / s comes from is decided by what makes x:

    a gain        Multiply(norm, g): it becomes g / s, and nothing more is computed than before
    a product     Multiply(act(gate), up) that nobody else reads, up = z U^T: the rows of U are divided, which moves no code of it
    all others    a Multiply by 1 / s is put between: a pass over the activations, which costs little beside the products
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from lowbit.algorithms.awq import search_scale
from lowbit.algorithms.rtn import importance_of, round_by_search
from lowbit.algorithms.trials import round_scaled
from lowbit.formats import Format
from lowbit.models.folding import ScalingGroup
from lowbit.openvino.activations import Seen
from lowbit.openvino.library import ops
from lowbit.openvino.sites import Site
from lowbit.options import AwqOptions

# Rows of every input that a scale is judged by.
ROWS = 256
_OPTIONS = AwqOptions(clip=False)


@dataclass
class Factors:
    """What weights are multiplied by before they are rounded, by the names of their sites: inputs [in] and outputs [out]."""

    inputs: dict[str, torch.Tensor] = field(default_factory=dict)
    outputs: dict[str, torch.Tensor] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)

    def applied(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """A weight [out, in] as it is rounded."""
        if name in self.inputs:
            weight = weight * self.inputs[name]
        return weight * self.outputs[name][:, None] if name in self.outputs else weight


class _Trial:
    """Products of one input, on some of its rows."""

    def __init__(self, weights: dict[str, torch.Tensor], formats: dict[str, Format], seen: Seen) -> None:
        self.weights, self.formats, self.statistics = weights, formats, seen.statistics
        self.group = ScalingGroup(tuple(weights), previous="")
        self.rows = torch.cat(seen.rows)
        self.size = sum(float((self.rows @ weight.t()).square().sum()) for weight in weights.values())

    def loss(self, scale: torch.Tensor | None) -> float:
        square, error = importance_of(self.statistics), 0.0
        for name, weight in self.weights.items():
            rounded = round_scaled(round_by_search, weight, self.formats[name], square, scale)
            error += float((self.rows @ (rounded - weight).t()).square().sum())
        return error / self.size if self.size else 0.0


def scale_inputs_(sites: Sequence[Site], formats: Mapping[str, Any], seen: Mapping[str, Seen]) -> Factors:
    """Search a scale for each input of products in few bits, and let the graph divide by it."""
    factors = Factors()
    products = {use.operation.get_friendly_name(): site for site in sites for use in site.uses if use.role == "linear"}
    groups: dict[int, list[Site]] = {}
    for site in sites:
        if site.name in seen and seen[site.name].rows and isinstance(formats.get(site.name), Format):
            groups.setdefault(id(seen[site.name]), []).append(site)
    for group in groups.values():
        known = seen[group[0].name]
        if known.statistics.is_blank or any(len(site.uses) != 1 or len(site.shape) != 2 for site in group):
            continue
        weights = {site.name: torch.from_numpy(site.read()) for site in group}
        scale, said = search_scale(_Trial(weights, {name: formats[name] for name in weights}, known), _OPTIONS)
        if scale is not None:
            said += f", {_divide_(group, scale, products, factors)}"
            factors.inputs |= dict.fromkeys(weights, scale)
        factors.notes |= dict.fromkeys(weights, f"awq: {said}")
    return factors


def _divide_(group: list[Site], scale: torch.Tensor, products: Mapping[str, Site], factors: Factors) -> str:
    """Let the products of a group read x / scale; says how."""
    readers = [site.uses[0].operation.input(0) for site in group]
    source = readers[0].get_source_output()
    node = source.get_node()
    alone = len(source.get_target_inputs()) == len(readers)
    if alone and node.get_type_name() == "Multiply":
        for place in (0, 1):
            side, other = node.input_value(place), node.input_value(1 - place)
            gain = _gain(side, len(scale))
            if gain is not None:
                _reroute_(readers, other, gain / scale.numpy(), side)
                return "in the norm before"
            before = products.get(side.get_node().get_friendly_name())
            if before is not None and _may_shrink(before, side, scale):
                factors.outputs[before.name] = 1 / scale
                return f"in {before.name}"
    _reroute_(readers, source, 1 / scale.numpy(), source)
    return "by a product of its own"


def _gain(side: Any, width: int) -> np.ndarray | None:
    """The numbers of a constant vector [.., width], also behind a Convert."""
    node = side.get_node()
    if node.get_type_name() == "Convert":
        node = node.input_value(0).get_node()
    if node.get_type_name() != "Constant" or node.get_output_size() == 0:
        return None
    values = np.asarray(node.get_data(dtype=np.float32))
    return values if values.size == width == values.shape[-1] else None


def _may_shrink(site: Site, output: Any, scale: torch.Tensor) -> bool:
    """Whether the rows of a weight may be divided: its product goes nowhere else."""
    return (
        len(site.uses) == 1 and len(site.shape) == 2 and site.shape[0] == len(scale) and len(output.get_target_inputs()) == 1
    )  # fmt: skip


def _reroute_(readers: list[Any], value: Any, factor: np.ndarray, like: Any) -> None:
    """Let products read value * factor, in the type that they read before."""
    kind = like.get_element_type()
    number = ops.constant(np.ascontiguousarray(factor, np.float32))
    product = ops.multiply(value, number if kind.to_string() == "f32" else ops.convert(number, kind.to_string()))
    for reader in readers:
        reader.replace_source_output(product.output(0))
