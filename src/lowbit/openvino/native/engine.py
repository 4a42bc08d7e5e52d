"""The engine that is a graph of OpenVINO: what lowbit.runtime asks of an engine, answered by infer requests.

A slot is a row of some `Rows`. Alone it has rows for itself; the beams of a search share theirs, so that a step of all of them is
one inference:

    copy slot 0 to slots 1 and 2        nothing moves: three slots name one row
    step of slots 0, 1, 2               one inference, whose order is [0, 0, 0]; each slot has a row of its own afterwards

Slots that share rows and are not part of a step are emptied by it: their row is not gathered. That is a beam that was given up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lowbit.errors import KernelError, LowbitError, RecipeError
from lowbit.models.spec import DecoderSpec
from lowbit.openvino.native.rows import Decoder, Floats, Rows
from lowbit.runtime.slots import Tokens


@dataclass(frozen=True)
class _Place:
    rows: Rows
    row: int


class IrEngine:
    """One compiled graph at work."""

    def __init__(self, decoder: Decoder, spec: DecoderSpec, context: int, slots: int = 1) -> None:
        if slots < 1:
            raise RecipeError(f"slots={slots} is out of range; use a number from 1 up")
        self.decoder, self.spec, self.context, self.slots = decoder, spec, context, slots
        self.lasting: Mapping[str, Any] = {}
        self._places: list[_Place | None] = [None] * slots
        self._checks = False

    def prefill(self, ids: Sequence[int] | Tokens, slot: int = 0) -> Floats:
        last: Floats = self._append(ids, slot, every=False)[-1]
        return last

    def decode(self, token: int, slot: int = 0) -> Floats:
        return self.prefill([token], slot)

    def logits(self, ids: Sequence[int] | Tokens, slot: int = 0) -> Floats:
        return self._append(ids, slot, every=True)

    def step(self, tokens: Sequence[int] | Tokens, slots: Sequence[int] | Tokens) -> Floats:
        ids, numbers = np.asarray(tokens, np.int32), [int(slot) for slot in slots]
        if len(ids) != len(numbers) or not numbers:
            raise RecipeError(f"{len(ids)} tokens for {len(numbers)} slots; name the slot of each token")
        if len(set(numbers)) == 1:
            return self._append(ids, numbers[0], every=True)
        places = [self._places[number] for number in numbers]
        together = [place.rows for place in places if place is not None]
        if len(set(numbers)) < len(numbers) or len(together) < len(places) or len({id(r) for r in together}) > 1:
            parts = [self._append(ids[i : i + 1], number, every=True) for i, number in enumerate(numbers)]
            return np.concatenate(parts)
        return self._read_together(together[0], ids, numbers)

    def length(self, slot: int = 0) -> int:
        place = self._places[slot]
        return 0 if place is None or place.rows.count == 0 else place.rows.length

    def truncate(self, slot: int, length: int) -> None:
        if length == 0:
            self._places[slot] = None
        elif length < self.length(slot):
            self._alone(slot).rows.truncate(length)

    def shortest(self, slot: int = 0) -> int:
        """The graph keeps every token, so any number of the last ones can be forgotten."""
        return 1

    def copy(self, source: int, target: int, length: int, common: int = 0) -> None:
        place = self._places[source]
        if length > self.length(source):
            raise RecipeError(f"slot {source} holds {self.length(source)} tokens, so {length} cannot be copied")
        if source == target:
            self.truncate(source, length)
        elif place is None or length == 0:
            self._places[target] = None
        elif length == place.rows.length:
            self._places[target] = place
        else:
            self._places[target] = _Place(place.rows.take([place.row], length), 0)

    def check(self, on: bool) -> None:
        """Look at the logits: a graph shows nothing of its layers."""
        self._checks = on

    def clear(self) -> None:
        """Empty every slot."""
        self._places = [None] * self.slots

    def _append(self, ids: Sequence[int] | Tokens, slot: int, every: bool) -> Floats:
        tokens = np.asarray(ids, np.int64).ravel()
        if not tokens.size:
            raise RecipeError("the prompt is empty; give at least one token")
        self._check_room(self.length(slot), tokens.size)
        place = self._alone(slot)
        wanted = np.arange(tokens.size) if every else np.asarray([tokens.size - 1])
        order = np.asarray([place.row])
        self._places[slot] = None  # an interruption leaves the slot empty
        found = self._checked(place.rows.read(tokens[None], order, wanted=wanted)[0])
        self._places[slot] = _Place(place.rows, 0)
        return found

    def _read_together(self, rows: Rows, tokens: Tokens, numbers: list[int]) -> Floats:
        self._check_room(rows.length, 1)
        order = np.asarray([place.row for n in numbers if (place := self._places[n]) is not None])
        self._places = [place if place is None or place.rows is not rows else None for place in self._places]
        found = self._checked(rows.read(tokens[:, None].astype(np.int64), order)[:, 0])
        for row, number in enumerate(numbers):
            self._places[number] = _Place(rows, row)
        return found

    def _alone(self, slot: int) -> _Place:
        """The place of a slot, whose rows no other slot shares."""
        place = self._places[slot]
        if place is None or place.rows.count == 0:
            place = _Place(Rows(self.decoder, self.lasting), 0)
        elif any(other is not None and other.rows is place.rows for other in self._others(slot)):
            place = _Place(place.rows.take([place.row], place.rows.length), 0)
        self._places[slot] = place
        return place

    def _others(self, slot: int) -> list[_Place | None]:
        return [place for number, place in enumerate(self._places) if number != slot]

    def _check_room(self, before: int, more: int) -> None:
        if before + more > self.context:
            raise RecipeError(
                f"{more} tokens after {before} do not fit the context of {self.context}; load the model with a larger one"
            )

    def _checked(self, logits: Floats) -> Floats:
        if self._checks and not np.isfinite(logits).all():
            raise KernelError(
                "the logits are not finite: compile the model with ov_config={'INFERENCE_PRECISION_HINT': 'f32'}, and if "
                "they stay so the weights are to blame (lowbit inspect)"
            )
        return logits


def check_vocabulary(spec: DecoderSpec, shape: Any) -> None:
    """The head of the graph has as many rows as the config says."""
    width = shape[-1]
    if width.is_static and width.get_length() != spec.vocab_size:
        raise LowbitError(
            f"the graph gives {width.get_length()} logits and config.json says vocab_size = {spec.vocab_size}: "
            "the two are not of the same model"
        )
