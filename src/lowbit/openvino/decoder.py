"""A `DecoderSpec` as a graph of OpenVINO: one of the four readers of the spec.

    weights: (role, layer) -> Placed        constants that an `Arena` keeps, vectors as arrays
    Decoder(spec, weights).model()          ov.Model: token ids -> logits, with its memory inside

The methods are the formulas of `models.spec`'s docstring in its words. A product is called what its module is called in
transformers ("model.layers.0.self_attn.q_proj"), which is how adapters of LoRA find it at run time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from lowbit.models.spec import DecoderSpec, LayerSpec
from lowbit.openvino.arena import Arena
from lowbit.openvino.attention import Inputs, attend, turn
from lowbit.openvino.constants import hold
from lowbit.openvino.graph import Floats, floats, heads_first, index, ints, normalize, reshape, soft_cap
from lowbit.openvino.library import Node, ops, ov
from lowbit.openvino.mlp import ExpertWeights, dense_mlp, mix_experts, split_experts
from lowbit.packing import PackedTensor
from lowbit.runtime.files import Loaded
from lowbit.runtime.stored import dequantize

Key = tuple[str, int | None]
# What is one number for a channel, or a table too small to pack.
_VECTORS = ("norm", "sinks")
EXPERTS = ("experts_gate_up", "experts_down")


@dataclass(frozen=True)
class Placed:
    """A weight of the graph: a node [.., out, in], or the numbers of a vector; its bias, and the order of its inputs."""

    name: str
    node: Node | None = None
    vector: Floats | None = None
    bias: Floats | None = None
    order: Floats | None = None
    parts: ExpertWeights | None = None


def place(arena: Arena, spec: DecoderSpec, loaded: Loaded) -> Placed:
    """Put a weight into the arena."""
    weight, role = loaded.weight, loaded.role
    described = spec.weight(role)
    assert described is not None
    name = described.name.format(layer=loaded.layer).removesuffix(".weight")
    bias = None if loaded.bias is None else loaded.bias.float32().copy()
    if role.endswith(_VECTORS):
        numbers = dequantize(weight) if isinstance(weight, PackedTensor) else weight
        return Placed(name, vector=numbers.float32().copy(), bias=bias)
    if role in EXPERTS:
        assert spec.experts is not None
        return Placed(name, parts=split_experts(arena, weight, role, spec.experts, name), bias=bias)
    order = hold(weight).order if isinstance(weight, PackedTensor) and weight.order is not None else None
    return Placed(name, arena.weight(weight, name), bias=bias, order=order)


class Decoder:
    """The computation, one method for each part of the spec."""

    def __init__(self, spec: DecoderSpec, weights: Mapping[Key, Placed]) -> None:
        self.spec, self.weights = spec, weights
        self.inputs = Inputs()

    def model(self) -> Node:
        h = self.embed()
        for number, layer in enumerate(self.spec.layers):
            h = self.layer(h, layer, number)
        if self.spec.head.final_norm:
            h = self.norm(h, "final_norm")
        h = self.linear(h, "head_in") if ("head_in", None) in self.weights else h
        logits = self.linear(h, "embedding" if self.spec.head.tied else "head", called="lm_head")
        if self.spec.head.multiplier != 1:
            logits = ops.multiply(logits, floats(self.spec.head.multiplier))
        logits = soft_cap(logits, self.spec.head.soft_cap)
        result = ops.result(logits, name="logits")
        result.get_output_tensor(0).set_names({"logits"})
        return ov.Model([result], self.inputs.written, self.inputs.parameters, self.spec.family)

    def embed(self) -> Node:
        embedding = self.spec.embedding
        h = ops.gather(self.weights["embedding", None].node, self.inputs.input_ids, index(0))
        if embedding.multiplier != 1:
            h = ops.multiply(h, floats(embedding.multiplier))
        h = self.linear(h, "embedding_in") if ("embedding_in", None) in self.weights else h
        if embedding.position_offset is not None:
            rows = ops.add(self.inputs.position_ids, index(embedding.position_offset))
            h = ops.add(h, ops.gather(self.weights["positions", None].node, rows, index(0)))
        return self.norm(h, "embedding_norm") if embedding.norm else h

    def layer(self, h: Node, layer: LayerSpec, i: int) -> Node:
        def attention(x: Node) -> Node:
            return self.attention(x, layer, i)

        def mlp(x: Node) -> Node:
            return self.experts(x, i) if layer.sparse else self.mlp(x, i)

        if self.spec.residual == "sequential":
            h = self.branch(h, attention, "attention", i)
            return self.branch(h, mlp, "mlp", i)
        normed = self.norm(h, "attention_norm", i)
        for_mlp = normed if self.spec.residual == "parallel_shared" else self.norm(h, "mlp_norm", i)
        return ops.add(h, self.scaled(ops.add(attention(normed), mlp(for_mlp))))

    def branch(self, h: Node, compute: Callable[[Node], Node], name: str, i: int) -> Node:
        """h plus one branch, with norms wherever the family puts them."""
        placement = self.spec.placement
        y = compute(self.norm(h, f"{name}_norm", i) if placement in ("pre", "sandwich") else h)
        y = self.norm(y, f"{name}_post_norm", i) if placement in ("post", "sandwich") else y
        h = ops.add(h, self.scaled(y))
        return self.norm(h, f"{name}_norm", i) if placement == "after_sum" else h

    def scaled(self, branch: Node) -> Node:
        factor = self.spec.residual_multiplier
        return branch if factor == 1 else ops.multiply(branch, floats(factor))

    def attention(self, x: Node, layer: LayerSpec, i: int) -> Node:
        spec = self.spec.attention
        q, k, v = self.qkv(x, i)
        if spec.qk_norm in ("head", "heads"):
            q, k = self.norm(q, "q_norm", i), self.norm(k, "k_norm", i)
        q, k, v = heads_first(q), heads_first(k), heads_first(v)
        if layer.rope is not None:
            tables = self.inputs.turns(layer.rope)
            q, k = (turn(side, layer.rope, spec.head_dim, *tables) for side in (q, k))
        sinks = self.weights["sinks", i].vector if spec.sinks else None
        sink = None if sinks is None else floats(sinks.reshape(1, -1, 1, 1))
        window = None if layer.window is None or layer.window >= self.spec.max_positions else layer.window
        return self.linear(attend(spec, self.inputs, (q, k, v), window, i, sink), "o", i)

    def qkv(self, x: Node, i: int) -> tuple[Node, Node, Node]:
        """q, k and v, each [batch, tokens, heads, channels]."""
        spec = self.spec.attention
        if spec.qkv == "separate":
            sides = [self.linear(x, role, i) for role in ("q", "k", "v")]
        else:
            sides = self.split_qkv(self.linear(x, "qkv", i))
        if spec.clip is not None:
            sides = [ops.clamp(side, -spec.clip, spec.clip) for side in sides]
        if spec.qk_norm == "width":
            sides[:2] = [self.norm(side, f"{name}_norm", i) for side, name in zip(sides, "qk", strict=False)]
        counts = (spec.heads, spec.kv_heads, spec.kv_heads)
        q, k, v = (reshape(side, 0, 0, count, spec.head_dim) for side, count in zip(sides, counts, strict=True))
        return q, k, v

    def split_qkv(self, fused: Node) -> list[Node]:
        spec = self.spec.attention
        if spec.qkv == "concatenated":
            sizes = ints(spec.q_size, spec.kv_size, spec.kv_size)
            return list(ops.variadic_split(fused, index(-1), sizes).outputs())
        # Each key head with its query heads before it and its value behind.
        grouped = reshape(fused, 0, 0, spec.kv_heads, -1, spec.head_dim)
        split = ops.variadic_split(grouped, index(3), ints(spec.heads // spec.kv_heads, 1, 1))
        widths = (spec.q_size, spec.kv_size, spec.kv_size)
        return [reshape(side, 0, 0, width) for side, width in zip(split.outputs(), widths, strict=True)]

    def mlp(self, x: Node, i: int) -> Node:
        assert self.spec.mlp is not None
        return dense_mlp(self.spec.mlp, lambda y, role: self.linear(y, role, i), x)

    def experts(self, x: Node, i: int) -> Node:
        spec = self.spec.experts
        assert spec is not None
        up, down = (self.weights[role, i] for role in EXPERTS)
        assert up.parts is not None and down.parts is not None
        scores = self.linear(x, "router", i)
        y = mix_experts(spec, x, scores, (up.parts, down.parts), (up.bias, down.bias))
        if spec.shared is None:
            return y
        shared = dense_mlp(spec.shared, lambda z, role: self.linear(z, f"shared_{role}", i), x)
        return ops.add(y, ops.multiply(ops.sigmoid(self.linear(x, "shared_router", i)), shared))

    def linear(self, x: Node, role: str, layer: int | None = None, called: str = "") -> Node:
        weight = self.weights[role, layer]
        if weight.order is not None:
            x = ops.gather(x, ints(*np.asarray(weight.order, np.int64).tolist()), index(-1))
        y = ops.matmul(x, weight.node, False, True)
        y.set_friendly_name(called or weight.name)
        return y if weight.bias is None else ops.add(y, floats(weight.bias))

    def norm(self, x: Node, role: str, layer: int | None = None) -> Node:
        weight = self.weights.get((role, layer))
        return normalize(x, self.spec.norm, weight.vector if weight else None, weight.bias if weight else None)


def build(spec: DecoderSpec, weights: Iterable[Loaded], arena: Arena) -> Node:
    """The model of a spec; weights are taken one after another, and the arena has to outlive the model."""
    placed = {(loaded.role, loaded.layer): place(arena, spec, loaded) for loaded in weights}
    return Decoder(spec, placed).model()
