"""Attention with its memory, as the plugins recognise it.

    inputs    input_ids, attention_mask, position_ids [batch, tokens], beam_idx [batch]
    memory    for each layer keys and values [batch, kv heads, tokens so far, channels], a variable of the model

`attention_mask` covers the tokens so far and the new ones; beam_idx says which sequence of the memory each row goes on
from. Keys and values of the memory are read (`read_value`), put in the order of the beams (`gather`), lengthened
(`concat`) and written back (`assign`). Plugins fuse these with the product of attention where nothing else reads them
and where a key head is repeated for its query heads by unsqueeze, two-way broadcast and reshape: 0.4 ms a token on a
tiny model, and 1.8 to 3.7 ms where one of these is written in another way. openvino_genai replaces all of it by paged
attention, which reads windows and slopes out of the graph around the mask: they are written as it knows them.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from lowbit.models.rope import inverse_frequencies
from lowbit.models.spec import AttentionSpec, RopeSpec
from lowbit.openvino.graph import floats, heads_first, index, ints, part, reshape, size, soft_cap
from lowbit.openvino.library import Node, factory, ops, ov, states

# What a score is lowered by where a query must not look: the largest that f16 holds. A row that sees nothing (padding
# before a shorter prompt) is then even, and not a NaN.
_HIDDEN = -65504.0
_END = 1 << 62


class Inputs:
    """The inputs of a decoder, and what all of its layers make of them once: masks and turns."""

    def __init__(self) -> None:
        self.input_ids = _input("input_ids", [-1, -1])
        self.attention_mask = _input("attention_mask", [-1, -1])
        self.position_ids = _input("position_ids", [-1, -1])
        self.beam_idx = _input("beam_idx", [-1], ov.Type.i32)
        self.batch, self.count = size(self.input_ids, 0), size(self.input_ids, 1)
        self.length = size(self.attention_mask, 1)
        self._masks: dict[tuple[int | None, tuple[float, ...]], Node] = {}
        self._turns: dict[RopeSpec, tuple[Node, Node]] = {}
        self.written: list[Node] = []

    @property
    def parameters(self) -> list[Node]:
        return [self.input_ids, self.attention_mask, self.position_ids, self.beam_idx]

    def mask(self, window: int | None, alibi: tuple[float, ...]) -> Node:
        """What is added to the scores, [batch, 1 or heads, tokens, tokens so far]."""
        key = (window, alibi)
        if key not in self._masks:
            self._masks[key] = self._make_mask(window, alibi)
        return self._masks[key]

    def _make_mask(self, window: int | None, alibi: tuple[float, ...]) -> Node:
        length, count = (ops.squeeze(n, index(0)) for n in (self.length, self.count))
        keys = ops.unsqueeze(ops.range(index(0), length, index(1), "i64"), ints(0, 1, 2))
        queries = ops.range(ops.subtract(length, count), length, index(1), "i64")
        queries = ops.unsqueeze(ops.unsqueeze(queries, ints(0, 1)), index(-1))
        kept = ops.not_equal(ops.unsqueeze(self.attention_mask, ints(1, 2)), index(0))
        seen = ops.less_equal(keys, queries)
        if window is not None:
            return self._windowed(seen, kept, ops.greater(keys, ops.add(queries, index(-window))))
        mask = ops.select(ops.logical_and(seen, kept), floats(0.0), floats(_HIDDEN))
        return mask if not alibi else ops.add(mask, self._sloped(keys, queries, alibi))

    def _windowed(self, seen: Node, kept: Node, near: Node) -> Node:
        """A mask with a window in the one form from which paged attention takes the window: others it drops unsaid."""
        both = ops.bitwise_and(ops.bitwise_and(seen, near), seen)
        both = ops.bitwise_and(ops.bitwise_and(seen, both), kept)
        whole = ops.broadcast(
            both, ops.concat([self.batch, ints(1), self.count, self.length], 0), broadcast_spec="NUMPY"
        )
        return part(ops.select(whole, floats(0.0), floats(_HIDDEN)), 0, _END)

    def _sloped(self, keys: Node, queries: Node, alibi: tuple[float, ...]) -> Node:
        """What ALiBi adds, [1, heads, tokens, tokens so far], in the form from which paged attention takes the slopes."""
        distance = ops.abs(ops.convert(ops.squeeze(ops.subtract(keys, queries), ints(0, 1)), "f32"))
        slopes = floats(-np.array(alibi, np.float32).reshape(-1, 1, 1))
        shape = ops.concat([ints(len(alibi)), self.count, self.length], 0)
        sloped = ops.multiply(slopes, ops.unsqueeze(distance, index(0)))
        return ops.unsqueeze(ops.broadcast(sloped, shape, broadcast_spec="NUMPY"), index(0))

    def turns(self, rope: RopeSpec) -> tuple[Node, Node]:
        """Cosine and sine of every pair of channels, [batch, 1, tokens, pairs]."""
        if rope not in self._turns:
            positions = ops.unsqueeze(ops.convert(self.position_ids, "f32"), ints(1, 3))
            angles = ops.multiply(positions, self._frequencies(rope))
            self._turns[rope] = (_scaled(ops.cos(angles), rope), _scaled(ops.sin(angles), rope))
        return self._turns[rope]

    def _frequencies(self, rope: RopeSpec) -> Node:
        """[1, 1, 1, pairs]; by the highest position of this call where they change with the length."""
        fixed = inverse_frequencies(rope, 1).reshape(1, 1, 1, -1)
        if not rope.depends_on_length:
            return floats(fixed)
        length = ops.add(ops.reduce_max(self.position_ids, ints(0, 1), False), index(1))
        if rope.kind == "longrope":
            longer = inverse_frequencies(rope, rope.trained_positions + 1).reshape(1, 1, 1, -1)
            return ops.select(ops.greater(length, index(rope.trained_positions)), floats(longer), floats(fixed))
        # dynamic: theta grows with the length, and each frequency is a power of it
        beyond = ops.convert(ops.maximum(length, index(rope.trained_positions)), "f32")
        stretch = ops.subtract(
            ops.multiply(beyond, floats(rope.factor / rope.trained_positions)), floats(rope.factor - 1)
        )
        theta = ops.multiply(floats(rope.theta), ops.power(stretch, floats(rope.rotary_dim / (rope.rotary_dim - 2))))
        exponents = -np.arange(0, rope.rotary_dim, 2).astype(np.float32) / np.float32(rope.rotary_dim)
        return ops.power(theta, floats(exponents.reshape(1, 1, 1, -1)))


def _input(name: str, shape: list[int], kind: Node = ov.Type.i64) -> Node:
    node = ops.parameter(shape, kind, name=name)
    node.get_output_tensor(0).set_names({name})
    return node


def _scaled(x: Node, rope: RopeSpec) -> Node:
    return x if rope.attention_factor == 1 else ops.multiply(x, floats(rope.attention_factor))


def turn(x: Node, rope: RopeSpec, head_dim: int, cosine: Node, sine: Node) -> Node:
    """Rotary positions on [batch, heads, tokens, channels]."""
    turning = x if rope.rotary_dim == head_dim else part(x, 0, rope.rotary_dim)
    turned = (_turn_neighbours if rope.pairing == "neighbours" else _turn_halves)(turning, rope, cosine, sine)
    return turned if turning is x else ops.concat([turned, part(x, rope.rotary_dim, head_dim)], -1)


def _turn_halves(x: Node, rope: RopeSpec, cosine: Node, sine: Node) -> Node:
    half = rope.rotary_dim // 2
    cosine, sine = (ops.concat([table, table], -1) for table in (cosine, sine))
    rotated = ops.concat([ops.negative(part(x, half, rope.rotary_dim)), part(x, 0, half)], -1)
    return ops.add(ops.multiply(x, cosine), ops.multiply(rotated, sine))


def _turn_neighbours(x: Node, rope: RopeSpec, cosine: Node, sine: Node) -> Node:
    first, second = part(x, 0, rope.rotary_dim, 2), part(x, 1, rope.rotary_dim, 2)
    pairs = (
        ops.subtract(ops.multiply(first, cosine), ops.multiply(second, sine)),
        ops.add(ops.multiply(second, cosine), ops.multiply(first, sine)),
    )
    together = ops.concat([ops.unsqueeze(side, index(-1)) for side in pairs], -1)
    return reshape(together, 0, 0, 0, rope.rotary_dim)


def remembered(x: Node, inputs: Inputs, spec: AttentionSpec, name: str) -> Node:
    """Keys or values [batch, kv heads, tokens, channels] behind those of earlier calls."""
    empty = ops.broadcast(
        floats(0.0),
        ops.concat([inputs.batch, ints(spec.kv_heads), ints(0), ints(spec.head_dim)], 0),
        broadcast_spec="NUMPY",
    )
    shape = ov.PartialShape([-1, spec.kv_heads, -1, spec.head_dim])
    past = states.read_value(empty, name, ov.Type.f32, shape)
    longer = ops.concat([ops.gather(past, inputs.beam_idx, index(0)), x], -2)
    inputs.written.append(states.assign(longer, name))
    return longer


def repeated(x: Node, spec: AttentionSpec) -> Node:
    """A key head for each of its query heads."""
    times = spec.heads // spec.kv_heads
    if times == 1:
        return x
    wide = ops.broadcast(ops.unsqueeze(x, ints(2)), ints(1, 1, times, 1, 1), broadcast_spec="BIDIRECTIONAL")
    return reshape(wide, 0, spec.heads, -1, spec.head_dim)


def attend(
    spec: AttentionSpec,
    inputs: Inputs,
    heads: tuple[Node, Node, Node],
    window: int | None,
    layer: int,
    sinks: Node | None,
) -> Node:
    """From q, k, v [batch, heads, tokens, channels], turned already, to [batch, tokens, heads * channels]."""
    q, k, v = heads
    names = (f"past_key_values.{layer}.{what}present.{layer}.{what}" for what in ("key", "value"))
    k, v = (repeated(remembered(x, inputs, spec, name), spec) for x, name in zip((k, v), names, strict=True))
    mask = inputs.mask(window, spec.alibi)
    product: Callable[..., Node] = _spelled_out if spec.soft_cap is not None else _fused
    y = product(spec, q, k, v, mask, sinks)
    return reshape(heads_first(y), 0, 0, spec.q_size)


def _fused(spec: AttentionSpec, q: Node, k: Node, v: Node, mask: Node, sinks: Node | None) -> Node:
    given = [q, k, v, mask, floats(spec.scale)]
    return factory("ScaledDotProductAttention", given if sinks is None else [*given, sinks], {"causal": False})


def _spelled_out(spec: AttentionSpec, q: Node, k: Node, v: Node, mask: Node, sinks: Node | None) -> Node:
    """Scores that are squeezed have no operation of their own."""
    scores = ops.multiply(ops.matmul(q, k, False, True), floats(spec.scale))
    shares = ops.softmax(ops.add(soft_cap(scores, spec.soft_cap), mask), -1)
    return ops.matmul(shares, v, False, False)
