"""Sequences that one infer request of a stateful graph has read: one row of its state each, all of one length.

    keys, values = state[beam_idx]; state = keys and values + those of the new tokens          (inside the graph)
    rows.read(tokens [rows, n], order [rows]) -> logits [rows, n, vocabulary]

`order` says from which row of the state each new row goes on. So beams change places, are dropped and are split in two by the same
gather that attention reads through, and nothing is copied beside the work. What the graph cannot do itself, forgetting the last
tokens and taking one row to another request, goes through the state's tensors, and costs one copy of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowbit.errors import LowbitError
from lowbit.openvino.library import ov
from lowbit.openvino.opening import infer

Floats = NDArray[np.float32]
Integers = NDArray[np.int64]
TOKENS, MASK, POSITIONS, ORDER, LOGITS = "input_ids", "attention_mask", "position_ids", "beam_idx", "logits"
# The positions whose logits are wanted: an input that `graph.ask_for_logits` adds.
WANTED = "logits_at"
_NEEDED = (TOKENS, ORDER)


def check_graph(model: Any) -> None:
    """Refuse a graph that is no language model with a state of its own."""
    inputs = {name for port in model.inputs for name in port.get_names()}
    outputs = {name for port in model.outputs for name in port.get_names()}
    missing = [name for name in _NEEDED if name not in inputs] + [name for name in (LOGITS,) if name not in outputs]
    if missing or not model.get_variables():
        what = f"no {' and no '.join(missing)}" if missing else "no state"
        raise LowbitError(
            f"the graph has {what}, so it is no language model that keeps what it has read: write it with "
            "`lowbit export openvino`, or run it as the openvino.Model that it is"
        )


@dataclass(frozen=True)
class Decoder:
    """A language model's graph on a device, and the shapes of its states before anything was read, for one row.

    Every request sets its states to these itself. Where attention is not fused with the state, the CPU leaves what another
    request had read there: it skips making a tensor without elements, and then takes the shape of the last one.
    """

    compiled: Any
    empty: Mapping[str, tuple[int, ...]]

    @classmethod
    def of(cls, model: Any, compiled: Any) -> Decoder:
        infos = [variable.info for variable in model.get_variables()]
        empty = {
            info.variable_id: tuple(map(_at_first, range(len(info.data_shape)), info.data_shape)) for info in infos
        }
        return cls(compiled, empty)


def _at_first(axis: int, size: Any) -> int:
    return int(size.get_length()) if size.is_static else int(axis == 0)


class Rows:
    """One infer request, and what its state holds."""

    def __init__(self, decoder: Decoder, lasting: Mapping[str, Any] | None = None) -> None:
        self._decoder = decoder
        self._request = decoder.compiled.create_infer_request()
        self._inputs = {name for port in decoder.compiled.inputs for name in port.get_names()}
        self._lasting = dict(lasting or {})
        for name, value in self._lasting.items():
            self._request.set_tensor(name, value)
        self.count = self.length = 0

    def read(
        self,
        tokens: Integers,
        order: Integers | None = None,
        mask: Integers | None = None,
        positions: Integers | None = None,
        wanted: Integers | None = None,
    ) -> Floats:
        """Read tokens [rows, n]; the logits [rows, n, vocabulary], or those at the `wanted` of the n positions.

        `mask` [rows, length + n] is 0 where a row is padding; positions count on from the state unless they are given.
        """
        rows, n = tokens.shape
        length = self.length + n
        inputs = {
            TOKENS: np.ascontiguousarray(tokens, np.int64),
            MASK: np.ones((rows, length), np.int64) if mask is None else np.ascontiguousarray(mask, np.int64),
            POSITIONS: np.tile(np.arange(self.length, length), (rows, 1)) if positions is None else positions,
            ORDER: np.ascontiguousarray(np.arange(rows) if order is None else order, np.int32),
            WANTED: np.arange(n) if wanted is None else np.ascontiguousarray(wanted, np.int64),
        }
        if not self.length:
            self._empty(rows)
        given = {name: value for name, value in inputs.items() if name in self._inputs}
        self.count = 0  # until it has ended well
        found = infer(self._request.infer, given, share_inputs=True)[LOGITS]
        self.count, self.length = rows, length
        logits: Floats = found if WANTED in self._inputs or wanted is None else found[:, wanted]
        return logits

    def cancel(self) -> None:
        """End a `read` that another thread makes: there it is a refusal."""
        self._request.cancel()

    def truncate(self, length: int) -> None:
        """Forget what follows the first `length` tokens of every row."""
        if length == 0:
            self.count = 0
        elif length < self.length:
            for state in self._request.query_state():
                state.state = ov.Tensor(_shortened(state.state, length))
        self.length = min(length, self.length)

    def take(self, rows: Sequence[int], length: int) -> Rows:
        """Rows of another request that hold the first `length` tokens of some of these."""
        taken = Rows(self._decoder, self._lasting)
        if not length:
            return taken
        held = {state.name: state.state for state in self._request.query_state()}
        for state in taken._request.query_state():
            state.state = ov.Tensor(np.ascontiguousarray(_shortened(held[state.name], length)[list(rows)]))
        taken.count, taken.length = len(rows), length
        return taken

    def _empty(self, rows: int) -> None:
        self._request.reset_state()
        for state in self._request.query_state():
            _, *rest = self._decoder.empty[state.name]
            state.state = ov.Tensor(np.zeros((rows, *rest), np.float32))


def _shortened(tensor: Any, length: int) -> NDArray[Any]:
    """Keys or values [rows, heads, tokens, channels] of the first tokens, in memory of their own."""
    return np.ascontiguousarray(tensor.data[:, :, :length])
