"""Where constants lie until a model is written, and how a weight becomes nodes of a graph.

OpenVINO takes the memory of an array as it is, without a copy and without keeping it alive: an `Arena` does that. With
the path of a graph the arena writes every constant to the graph's .bin and maps it, so that a model of any size is built with the
memory of one weight: what is mapped are clean pages of a file, which the system takes back when it wants them.

    with Arena(folder / "openvino_model.xml") as arena:
        node = arena.weight(packed, "model.layers.0.mlp.up_proj")     # f32 [.., out, in]
        ...
        arena.save(model)                                             # before the arena is closed

So most of a graph's weights are where they belong before there is a graph. OpenVINO writes the .xml, and what it says of the place
of each constant is replaced: it would write all of them once more, a second of a core for 700 MB.
"""

from __future__ import annotations

import html
import os
import re
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowbit.errors import LowbitError
from lowbit.openvino.constants import Held, Numbers, hold, hold_dense
from lowbit.openvino.library import Node, ops, ov, release, writing
from lowbit.openvino.spool import Spool, owned
from lowbit.packing import PackedTensor
from lowbit.progress import progress
from lowbit.runtime.stored import Weight

# Smaller constants are put behind the others when the graph is written: as many of them are alike as not, and take no page each.
_SMALL = 1 << 16
# Where an .xml has the place of a constant, behind the constant's name.
_PLACE = re.compile(r'(<layer id="\d+" name="([^"]*)" type="Const" version="\w+">\s*<data [^>]*\boffset=")\d+(")')


class Arena:
    """The memory of constants. `notes` says, once each, what could not be held as it was."""

    def __init__(self, graph: Path | None = None) -> None:
        self.notes: list[str] = []
        self._graph = graph
        self._kept: list[tuple[Node, NDArray[Any], int | None]] = []
        # Closed with the arena.
        self._spool = None if graph is None else Spool(graph.with_suffix(".bin").open("w+b"))

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
        array, begin = np.ascontiguousarray(numbers.array), None
        if self._spool is None or array.nbytes < _SMALL:
            array = owned(array)
        else:
            array, begin = self._spool.place(array)
        tensor = ov.Tensor(array, ov.Shape(list(numbers.shape)), getattr(ov.Type, numbers.type))
        node = ops.constant(tensor, shared_memory=True)
        self._kept.append((node, array, begin))
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

    def save(self, model: Node) -> None:
        """Write a graph: the .xml, and to the .bin what it does not hold yet."""
        assert self._graph is not None and self._spool is not None, "an arena in memory has no file"
        with progress("writing"):
            _serialize(model, self._graph)
            text, places = self._graph.read_text(encoding="utf-8"), self._places(model, self._spool)
            text, count = _PLACE.subn(lambda found: f"{found[1]}{places[html.unescape(found[2])]}{found[3]}", text)
            self._spool.cut()
            if count != len(places):
                raise LowbitError(
                    f"OpenVINO {release()} names the constants of a graph in a way that lowbit does not know"
                )
            self._graph.write_text(text, encoding="utf-8")

    def _places(self, model: Node, spool: Spool) -> dict[str, int]:
        """Where each constant of a graph lies in the .bin, by its name; those that were not there are now."""
        ours = {node.get_friendly_name(): (array, begin) for node, array, begin in self._kept}
        small: dict[bytes, int] = {}
        places: dict[str, int] = {}
        for node in (node for node in model.get_ordered_ops() if node.get_type_name() == "Constant"):
            name = node.get_friendly_name()
            array, begin = ours[name] if name in ours else (np.asarray(node.data), None)
            if begin is None:
                data = array.tobytes()
                begin = small[data] = small[data] if data in small else spool.append(data)
            places[name] = begin
        return places


def _serialize(model: Node, graph: Path) -> None:
    """The .xml alone. What OpenVINO cannot write to its end it removes, the weights' file too: that is a link, not the device."""
    with tempfile.TemporaryDirectory(prefix="lowbit-") as place, writing(graph):
        nowhere = Path(place) / "nowhere"
        nowhere.symlink_to(os.devnull)
        ov.serialize(model, graph, nowhere)
