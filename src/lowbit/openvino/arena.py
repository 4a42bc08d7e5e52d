"""Where constants lie until a model is written, and how a weight becomes nodes of a graph.

OpenVINO takes the memory of an array as it is, without a copy and without keeping it alive: an `Arena` does that. With
a folder the arena writes every constant to a file and maps it, so that a model of any size is built with the memory of
one weight: what is mapped are clean pages of a file, which the system takes back when it wants them.

    with Arena(folder) as arena:
        node = arena.weight(packed, "model.layers.0.mlp.up_proj")     # f32 [.., out, in]
        ...
        save_model(...)                                               # before the arena is closed
"""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowbit.openvino.constants import Held, Numbers, hold, hold_dense
from lowbit.openvino.library import Node, ops, ov
from lowbit.openvino.spool import Spool, owned
from lowbit.packing import PackedTensor
from lowbit.runtime.stored import Weight


class Arena:
    """The memory of constants. `notes` says, once each, what could not be held as it was."""

    def __init__(self, folder: Path | None = None) -> None:
        self.notes: list[str] = []
        self._kept: list[Any] = []
        self._spool = None if folder is None else Spool(folder)

    def __enter__(self) -> Arena:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._kept.clear()
        if self._spool is not None:
            self._spool.close()

    def constant(self, numbers: Numbers, name: str = "") -> Node:
        """A Constant over memory that the arena keeps."""
        array = self._keep(np.ascontiguousarray(numbers.array))
        tensor = ov.Tensor(array, ov.Shape(list(numbers.shape)), getattr(ov.Type, numbers.type))
        node = ops.constant(tensor, shared_memory=True)
        if name:
            node.set_friendly_name(name)
        return node

    def weight(self, weight: Weight, name: str) -> Node:
        """The f32 value of a weight, whose constants are called after it."""
        if isinstance(weight, PackedTensor):
            return self.packed(hold(weight), name)
        return self.plain(hold_dense(weight.array, weight.dtype), name)

    def plain(self, numbers: Numbers, name: str) -> Node:
        node = self.constant(numbers, f"{name}.weight")
        return node if numbers.type == "f32" else ops.convert(node, "f32")

    def packed(self, held: Held, name: str) -> Node:
        """Constant -> Convert -> [Subtract] -> Multiply -> Reshape, which plugins fold into the product behind it."""
        if held.note and held.note not in self.notes:
            self.notes.append(held.note)
        # Numbers pass through f16 where it holds all of them, as graphics processors like it; nf4's levels it does not hold.
        halves = (
            held.scales.type == "f16" and held.codes.type != "nf4" and (held.zeros is None or held.zeros.type != "f32")
        )
        through = "f16" if halves else "f32"
        value = ops.convert(self.constant(held.codes, f"{name}.weight"), through)
        if held.zeros is not None:
            value = ops.subtract(value, self._as(held.zeros, through, f"{name}.zeros"))
        scales = self._as(held.scales, through, f"{name}.scales")
        if held.factor is not None:
            scales = ops.multiply(scales, ops.constant(np.array(held.factor, np.float32)))
        value = ops.multiply(value, scales)
        value = ops.reshape(value, ops.constant(np.array(held.shape, np.int64)), False)
        return ops.convert(value, "f32") if halves else value

    def _as(self, numbers: Numbers, kind: str, name: str) -> Node:
        node = self.constant(numbers, name)
        return node if numbers.type == kind else ops.convert(node, kind)

    def _keep(self, array: NDArray[Any]) -> NDArray[Any]:
        kept = owned(array) if self._spool is None else self._spool.keep(array)
        self._kept.append(kept)
        return kept
