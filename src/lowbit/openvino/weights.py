"""Weights as nodes of a graph that owns their numbers: for graphs that live on in memory, without an arena beside them."""

from __future__ import annotations

import numpy as np

from lowbit.openvino.arena import Arena
from lowbit.openvino.constants import Held, Numbers
from lowbit.openvino.library import Node, ops, ov


class Copies(Arena):
    """An arena that keeps nothing: every constant is a copy in OpenVINO's own memory."""

    def constant(self, numbers: Numbers, name: str = "") -> Node:
        array = np.ascontiguousarray(numbers.array)
        tensor = ov.Tensor(array, ov.Shape(list(numbers.shape)), getattr(ov.Type, numbers.type))
        node = ops.constant(tensor, shared_memory=False)
        if name:
            node.set_friendly_name(name)
        return node


def weight_output(held: Held, name: str) -> Node:
    """The output [.., out, in] in f32 of a weight's nodes, whose constants are called after it."""
    return Copies().packed(held, name).output(0)
