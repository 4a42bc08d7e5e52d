"""The small pieces that graphs are made of: constants, shapes, norms, activations."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lowbit.models.spec import Activation, NormSpec
from lowbit.openvino.library import Node, ops

Floats = NDArray[np.float32]


def ints(*values: int) -> Node:
    return ops.constant(np.array(values, np.int64))


def index(value: int) -> Node:
    """A scalar, as axes are."""
    return ops.constant(np.array(value, np.int64))


def floats(values: float | Floats) -> Node:
    """Plain numbers, copied."""
    return ops.constant(np.array(values, np.float32))


def size(x: Node, axis: int) -> Node:
    """The length of an axis, as a list of one."""
    return ops.gather(ops.shape_of(x, "i64"), ints(axis), index(0))


def reshape(x: Node, *shape: int) -> Node:
    """0 stands for the size that an axis has, -1 for what is left."""
    return ops.reshape(x, ints(*shape), True)


def part(x: Node, start: int, stop: int, step: int = 1) -> Node:
    """Some of the last axis."""
    return ops.slice(x, ints(start), ints(stop), ints(step), ints(-1))


def heads_first(x: Node) -> Node:
    """[batch, tokens, heads, channels] to [batch, heads, tokens, channels], and back."""
    return ops.transpose(x, ints(0, 2, 1, 3))


def soft_cap(x: Node, cap: float | None) -> Node:
    return x if cap is None else ops.multiply(ops.tanh(ops.divide(x, floats(cap))), floats(cap))


def activate(x: Node, activation: Activation) -> Node:
    if activation == "silu":  # not ops.swish, which has a second input: only this is recognised among experts
        return ops.multiply(x, ops.sigmoid(x))
    if activation == "relu":
        return ops.relu(x)
    return ops.gelu(x, "tanh" if activation == "gelu_tanh" else "erf")


def normalize(x: Node, spec: NormSpec, weight: Floats | None, bias: Floats | None) -> Node:
    """As `NormSpec` says it, along the last axis; in the operations that plugins know for one norm."""
    if spec.kind == "layer":
        y = ops.mvn(x, ints(-1), True, spec.eps, "inside_sqrt")
    else:
        mean = ops.reduce_mean(ops.power(x, floats(2.0)), ints(-1), True)
        y = ops.multiply(x, ops.divide(floats(1.0), ops.sqrt(ops.add(mean, floats(spec.eps)))))
    if weight is not None:
        y = ops.multiply(y, floats(weight + np.float32(spec.offset)))
    return y if bias is None else ops.add(y, floats(bias))
