"""What follows attention in a layer: one MLP, or experts of which a router chooses some for every token.

A plugin computes only the experts that were chosen where it recognises the graph of all of them:

    tokens [T, in] -> tile, reshape [E, T, in] -> gate and up [E, T, width] -> swish * up -> down [E, T, out]
    router scores -> top k -> scattered into zeros [T, E] -> transpose
    both reshaped to [E, batch, tokens, ...], their product summed over E

The sizes of that reshape are computed and not written down: one of constants is merged with its neighbours before
plugins look for it.

(`gate_up` with biases in one product where families clamp them, GPT-OSS). So the graph says what all experts would
give, times zero for those that were not chosen, and what runs is k products a token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from lowbit.models.spec import ExpertsSpec, MlpSpec
from lowbit.openvino.arena import Arena
from lowbit.openvino.constants import plain_scales
from lowbit.openvino.graph import Floats, activate, floats, index, ints, part, reshape, size
from lowbit.openvino.library import Node, ops
from lowbit.packing import PackedTensor
from lowbit.runtime.stored import Dense, Weight

Linear = Callable[[Node, str], Node]


@dataclass(frozen=True)
class ExpertWeights:
    """The nodes of a stack of experts [E, out, in]: one, or gate and up by themselves."""

    nodes: tuple[Node, ...]
    names: tuple[str, ...]


def dense_mlp(spec: MlpSpec, linear: Linear, x: Node) -> Node:
    """down @ act(up @ x), or with a gate; `linear` multiplies by the weight of a role."""
    if spec.gate == "none":
        return linear(activate(linear(x, "up"), spec.activation), "down")
    if spec.gate == "separate":
        return linear(gated(spec, linear(x, "gate"), linear(x, "up")), "down")
    return linear(gated(spec, *split_gate(spec, linear(x, "gate_up"))), "down")


def split_gate(spec: MlpSpec, fused: Node) -> tuple[Node, Node]:
    width = spec.intermediate_size
    if spec.gate == "interleaved":
        return part(fused, 0, 2 * width, 2), part(fused, 1, 2 * width, 2)
    return part(fused, 0, width), part(fused, width, 2 * width)


def gated(spec: MlpSpec, gate: Node, up: Node) -> Node:
    if spec.limit is None:
        return ops.multiply(activate(gate, spec.activation), up)
    gate = ops.swish(ops.minimum(gate, floats(spec.limit)), floats(spec.sigmoid_scale))
    return ops.multiply(ops.add(ops.clamp(up, -spec.limit, spec.limit), floats(1.0)), gate)


def split_experts(arena: Arena, weight: Weight, role: str, spec: ExpertsSpec, name: str) -> ExpertWeights:
    """Put the experts of a layer into the arena: gate and up apart where they lie one above the other."""
    if role == "experts_down" or spec.expert.gate != "concatenated":
        return ExpertWeights((arena.weight(weight, name),), (name,))
    names = tuple(f"{name}.{side}" for side in ("gate", "up"))
    halves = [_half(weight, side) for side in range(2)]
    return ExpertWeights(tuple(map(arena.weight, halves, names)), names)


def _half(weight: Weight, side: int) -> Weight:
    if isinstance(weight, PackedTensor):
        return plain_scales(weight).shard(0, side, 2)
    rows = weight.shape[-2] // 2
    return Dense(weight.array[..., side * rows : (side + 1) * rows, :], weight.dtype)


def mix_experts(
    spec: ExpertsSpec,
    x: Node,
    scores: Node,
    weights: tuple[ExpertWeights, ExpertWeights],
    biases: tuple[Floats | None, Floats | None],
) -> Node:
    """The chosen experts' answers [batch, tokens, out], weighted."""
    gate_up, down = weights
    width = x.get_output_partial_shape(0)[2].get_length()
    tokens = reshape(x, -1, width)
    tiled = reshape(ops.tile(tokens, ints(spec.count, 1)), spec.count, -1, width)
    if len(gate_up.nodes) == 2:
        gate, up = (_product(tiled, node, name) for node, name in zip(gate_up.nodes, gate_up.names, strict=True))
        inner = gated(spec.expert, gate, up)
    else:
        fused = _biased(_product(tiled, gate_up.nodes[0], gate_up.names[0]), biases[0])
        inner = gated(spec.expert, *split_gate(spec.expert, fused))
    answers = _biased(_product(inner, down.nodes[0], down.names[0]), biases[1])
    rows = ops.concat([ints(spec.count), size(x, 0), size(x, 1)], 0)
    answers = ops.reshape(answers, ops.concat([rows, ints(width)], 0), False)
    return ops.reduce_sum(ops.multiply(answers, _shares(spec, scores, rows)), ints(0), False)


def _product(x: Node, weight: Node, name: str) -> Node:
    y = ops.matmul(x, weight, False, True)
    y.set_friendly_name(name)
    return y


def _biased(x: Node, bias: Floats | None) -> Node:
    return x if bias is None else ops.add(x, floats(np.expand_dims(bias, 1)))


def _shares(spec: ExpertsSpec, scores: Node, rows: Node) -> Node:
    """What each expert's answer counts for each token, [E, batch, tokens, 1]; `rows` are the first three sizes."""
    probabilities = ops.softmax(reshape(scores, -1, spec.count), -1)
    chosen = ops.topk(probabilities, index(spec.top_k), -1, "max", "value", "i64")
    shares, experts = chosen.output(0), chosen.output(1)
    if spec.normalize:
        shares = ops.divide(shares, ops.reduce_sum(shares, ints(-1), True))
    none = ops.broadcast(floats(0.0), ops.concat([size(shares, 0), ints(spec.count)], 0), broadcast_spec="NUMPY")
    spread = ops.scatter_elements_update(none, experts, shares, index(1))
    return ops.unsqueeze(ops.reshape(ops.transpose(spread, ints(1, 0)), rows, False), index(-1))
