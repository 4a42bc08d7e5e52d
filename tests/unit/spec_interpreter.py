"""Run a `DecoderSpec` in plain numpy, slowly: the truth that faster engines are tested against.

Reads like the docstring of `lowbit.models.spec`, in float64, for one sequence at a time and without a cache:

    tensors [name -> array] -> Decoder -> logits [tokens, vocab_size]

Shapes: T tokens, H heads, D channels of a head.
"""

import math
from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from lowbit.models.rope import rotation
from lowbit.models.spec import AttentionSpec, DecoderSpec, ExpertsSpec, LayerSpec, Located, MlpSpec, NormSpec, RopeSpec

Array = NDArray[np.float64]
Affine = tuple[Array, Array | None]  # a weight and its bias


def decoder_logits(spec: DecoderSpec, tensors: Mapping[str, NDArray], tokens: list[int]) -> Array:
    """The logits [T, vocab_size] of a sequence, from arrays under any of the names that the spec knows."""
    weights = {key: read_weight(located, tensors) for key, located in spec.locate(tensors).items()}
    return Decoder(spec, weights).logits(np.array(tokens))


def read_weight(located: Located, tensors: Mapping[str, NDArray]) -> Affine:
    """One weight as [.., out, in] in float64, put together from its pieces, and its bias."""
    rows = [np.concatenate([tensors[name] for name in row]) for row in located.names]
    weight = np.stack(rows) if located.in_pieces else rows[0]
    if located.weight.transposed:
        weight = weight.swapaxes(-1, -2)
    assert weight.shape == located.weight.shape, f"{located.names[0][0]}: {weight.shape}, not {located.weight.shape}"
    bias = None if located.bias is None else tensors[located.bias].astype(np.float64)
    return weight.astype(np.float64), bias


class Decoder:
    """The computation, one method for each part of the spec."""

    def __init__(self, spec: DecoderSpec, weights: Mapping[tuple[str, int | None], Affine]) -> None:
        self.spec = spec
        self.weights = weights

    def logits(self, tokens: NDArray[np.int64]) -> Array:
        h = self.embed(tokens)
        for index, layer in enumerate(self.spec.layers):
            h = self.layer(h, layer, index)
        if self.spec.head.final_norm:
            h = self.norm(h, "final_norm")
        h = self.linear(h, "head_in") if self.has("head_in") else h
        head = "embedding" if self.spec.head.tied else "head"
        return soft_cap(self.linear(h, head) * self.spec.head.multiplier, self.spec.head.soft_cap)

    def embed(self, tokens: NDArray[np.int64]) -> Array:
        embedding = self.spec.embedding
        h = self.weights["embedding", None][0][tokens] * embedding.multiplier
        h = self.linear(h, "embedding_in") if self.has("embedding_in") else h
        if embedding.position_offset is not None:
            h = h + self.weights["positions", None][0][np.arange(len(tokens)) + embedding.position_offset]
        return self.norm(h, "embedding_norm") if embedding.norm else h

    def layer(self, h: Array, layer: LayerSpec, i: int) -> Array:
        def attend(x: Array) -> Array:
            return self.attention(x, layer, i)

        def mix(x: Array) -> Array:
            return self.experts(x, i) if layer.sparse else self.mlp(x, i)

        if self.spec.residual == "sequential":
            h = self.branch(h, attend, "attention", i)
            return self.branch(h, mix, "mlp", i)
        normed = self.norm(h, "attention_norm", i)
        for_mlp = normed if self.spec.residual == "parallel_shared" else self.norm(h, "mlp_norm", i)
        return h + self.spec.residual_multiplier * (attend(normed) + mix(for_mlp))

    def branch(self, h: Array, compute: Callable[[Array], Array], name: str, i: int) -> Array:
        """h plus one branch, with norms wherever the family puts them."""
        placement = self.spec.placement
        x = self.norm(h, f"{name}_norm", i) if placement in ("pre", "sandwich") else h
        y = compute(x)
        y = self.norm(y, f"{name}_post_norm", i) if placement in ("post", "sandwich") else y
        h = h + self.spec.residual_multiplier * y
        return self.norm(h, f"{name}_norm", i) if placement == "after_sum" else h

    def attention(self, x: Array, layer: LayerSpec, i: int) -> Array:
        spec, count = self.spec.attention, len(x)
        q, k, v = self.project_qkv(x, i)
        if spec.qk_norm == "width":
            q, k = self.norm(q, "q_norm", i), self.norm(k, "k_norm", i)
        q, k, v = (x.reshape(count, -1, spec.head_dim) for x in (q, k, v))  # [T, H, D]
        if spec.qk_norm in ("head", "heads"):
            q, k = self.norm(q, "q_norm", i), self.norm(k, "k_norm", i)
        if layer.rope is not None:
            q, k = turn(q, layer.rope), turn(k, layer.rope)
        k, v = (x.repeat(spec.heads // spec.kv_heads, axis=1) for x in (k, v))
        scores = attention_scores(spec, q, k, layer.window)
        if spec.sinks:
            sinks = self.weights["sinks", i][0][:, None, None]
            scores = np.concatenate([scores, np.broadcast_to(sinks, (spec.heads, count, 1))], axis=-1)
        shares = softmax(scores)[:, :, :count]
        return self.linear(np.einsum("hqk,khd->qhd", shares, v).reshape(count, -1), "o", i)

    def project_qkv(self, x: Array, i: int) -> tuple[Array, Array, Array]:
        spec = self.spec.attention
        if spec.qkv == "separate":
            q, k, v = (self.linear(x, role, i) for role in ("q", "k", "v"))
        else:
            fused = self.linear(x, "qkv", i)
            q, k, v = (fused[:, rows] for rows in spec.qkv_rows())
        if spec.clip is not None:
            q, k, v = (np.clip(x, -spec.clip, spec.clip) for x in (q, k, v))
        return q, k, v

    def mlp(self, x: Array, i: int) -> Array:
        spec = self.spec.mlp
        assert spec is not None
        if spec.gate == "separate":
            inner = gated(self.linear(x, "gate", i), self.linear(x, "up", i), spec)
        elif spec.gate == "none":
            inner = ACTIVATIONS[spec.activation](self.linear(x, "up", i))
        else:
            inner = gated(*split_gate(self.linear(x, "gate_up", i), spec), spec)
        return self.linear(inner, "down", i)

    def experts(self, x: Array, i: int) -> Array:
        spec = self.spec.experts
        assert spec is not None
        y = np.zeros_like(x)
        for t, probabilities in enumerate(softmax(self.linear(x, "router", i))):
            chosen = np.argsort(-probabilities)[: spec.top_k]
            total = probabilities[chosen].sum() if spec.normalize else 1.0
            for e in chosen:
                y[t] += probabilities[e] / total * self.expert(x[t], spec, e, i)
        if spec.shared is not None:
            inner = gated(self.linear(x, "shared_gate", i), self.linear(x, "shared_up", i), spec.shared)
            share = 1 / (1 + np.exp(-self.linear(x, "shared_router", i)))
            y = y + share * self.linear(inner, "shared_down", i)
        return y

    def expert(self, x: Array, spec: ExpertsSpec, e: int, i: int) -> Array:
        (up, up_bias), (down, down_bias) = self.weights["experts_gate_up", i], self.weights["experts_down", i]
        gate_up = up[e] @ x + (0 if up_bias is None else up_bias[e])
        inner = gated(*split_gate(gate_up, spec.expert), spec.expert)
        return down[e] @ inner + (0 if down_bias is None else down_bias[e])

    def has(self, role: str) -> bool:
        return (role, None) in self.weights

    def linear(self, x: Array, role: str, layer: int | None = None) -> Array:
        weight, bias = self.weights[role, layer]
        return x @ weight.T + (0 if bias is None else bias)

    def norm(self, x: Array, role: str, layer: int | None = None) -> Array:
        return normalize(x, self.spec.norm, *self.weights.get((role, layer), (None, None)))


def normalize(x: Array, spec: NormSpec, weight: Array | None, bias: Array | None) -> Array:
    if spec.kind == "layer":
        x = x - x.mean(-1, keepdims=True)
    y = x / np.sqrt((x * x).mean(-1, keepdims=True) + spec.eps)
    y = y if weight is None else y * (spec.offset + weight)
    return y if bias is None else y + bias


def turn(x: Array, rope: RopeSpec) -> Array:
    """Rotary positions on [T, H, D]: the first rotary_dim channels of each head, pair by pair."""
    count, half = len(x), rope.rotary_dim // 2
    cos, sin = (table[:, None, :] for table in rotation(rope, np.arange(count), length=count))
    neighbours = rope.pairing == "neighbours"
    first = slice(0, rope.rotary_dim, 2) if neighbours else slice(0, half)
    second = slice(1, rope.rotary_dim, 2) if neighbours else slice(half, rope.rotary_dim)
    turned = x.copy()
    turned[..., first] = x[..., first] * cos - x[..., second] * sin
    turned[..., second] = x[..., second] * cos + x[..., first] * sin
    return turned


def attention_scores(spec: AttentionSpec, q: Array, k: Array, window: int | None) -> Array:
    """[H, T, T], minus infinity where a query must not look."""
    scores = soft_cap(np.einsum("qhd,khd->hqk", q, k) * spec.scale, spec.soft_cap)
    distance = np.arange(len(q))[:, None] - np.arange(len(q))  # query position minus key position
    if spec.alibi:
        scores = scores - np.array(spec.alibi)[:, None, None] * distance
    seen = (distance >= 0) & (distance < (window or len(q)))
    return np.where(seen, scores, -np.inf)


def gated(gate: Array, up: Array, spec: MlpSpec) -> Array:
    if spec.limit is None:
        return ACTIVATIONS[spec.activation](gate) * up
    gate, up = np.minimum(gate, spec.limit), np.clip(up, -spec.limit, spec.limit)
    return gate / (1 + np.exp(-spec.sigmoid_scale * gate)) * (up + 1)


def split_gate(gate_up: Array, spec: MlpSpec) -> tuple[Array, Array]:
    if spec.gate == "interleaved":
        return gate_up[..., ::2], gate_up[..., 1::2]
    return gate_up[..., : spec.intermediate_size], gate_up[..., spec.intermediate_size :]


def softmax(scores: Array) -> Array:
    powers = np.exp(scores - scores.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def soft_cap(x: Array, cap: float | None) -> Array:
    return x if cap is None else cap * np.tanh(x / cap)


_erf = np.vectorize(math.erf)
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu": lambda x: x / 2 * (1 + _erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: np.maximum(x, 0),
}
