"""What transformers' generate asks of a cache, answered by a graph that keeps keys and values itself.

The cache holds no tensors: it holds the infer request whose state they are in, and from which row of it each row goes on at the
next call. Reordering beams, repeating a prompt and picking rows are that list alone. Every cache has a request of its own, so that
one which was returned can be gone on with later, whatever was generated in between.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import transformers

from lowbit.openvino.native.rows import Integers, Rows


class GraphCache(transformers.Cache):  # type: ignore[misc]  # transformers is not typed
    """A cache without layers: what they would hold is in a graph's state."""

    # generate slices no prompt whose cache has linear layers alone, and would take one without layers for that.
    is_linear = (False,)

    def __init__(self) -> None:
        super().__init__(layers=[])


class StateCache(GraphCache):
    """The past of a call of `OVModelForCausalLM`."""

    def __init__(self, rows: Rows) -> None:
        super().__init__()
        self.rows = rows
        self.order: Integers | None = None

    def take_order(self, rows: int) -> Integers:
        """From which row of the state each of the rows to come goes on; from the next call on, each from its own."""
        order = np.arange(rows) if self.order is None else self.order
        self.order = None
        return order

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.rows.length

    @property
    def batch_size(self) -> int:
        return -1 if not self.rows.length else self.rows.count if self.order is None else len(self.order)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        if self.rows.length:
            self.order = self._order()[indices.cpu().numpy()]

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.rows.length:
            self.order = np.repeat(self._order(), repeats)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget so many of the last tokens, given below 0; a number above 0 says how many stay, as older transformers have it."""
        if tokens_to_remove:
            kept = tokens_to_remove if tokens_to_remove > 0 else max(0, self.rows.length + tokens_to_remove)
            self.rows.truncate(kept)

    def reset(self) -> None:
        self.rows.truncate(0)
        self.order = None

    def _order(self) -> Integers:
        return np.arange(self.rows.count) if self.order is None else self.order

    def __deepcopy__(self, memo: dict[int, Any]) -> StateCache:
        return StateCache(self.rows.take(self._order().tolist(), self.rows.length))
