"""The spec's interpreter behind the engine's face: slow, without a cache, and right. For tests of what stands on an engine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lowbit.models.spec import DecoderSpec
from lowbit.packing import PackedTensor
from lowbit.runtime.files import ModelFiles, open_files, read_spec, read_weights
from lowbit.runtime.stored import dequantize
from unit.spec_interpreter import Decoder


class InterpreterEngine:
    """Remembers the tokens of each slot and computes everything anew. `read` counts the tokens that it was given."""

    def __init__(self, spec: DecoderSpec, decoder: Decoder, context: int | None = None, slots: int = 1) -> None:
        self.spec, self.decoder, self.slots = spec, decoder, slots
        self.context = min(context or spec.max_positions, spec.max_positions)
        self.held: list[list[int]] = [[] for _ in range(slots)]
        self.read = 0

    @classmethod
    def open(cls, path: Path, **options: int) -> InterpreterEngine:
        files = open_files(path)
        spec = read_spec(files)
        return cls(spec, Decoder(spec, dense_weights(files, spec)), **options)

    def prefill(self, ids: Sequence[int], slot: int = 0) -> NDArray[np.float32]:
        return self.step(ids, [slot] * len(ids))[-1]

    def decode(self, token: int, slot: int = 0) -> NDArray[np.float32]:
        return self.step([token], [slot])[0]

    def step(self, tokens: Sequence[int], slots: Sequence[int]) -> NDArray[np.float32]:
        rows = []
        self.read += len(tokens)
        order = list(zip([int(t) for t in tokens], [int(s) for s in slots], strict=True))
        for token, slot in order:
            self.held[slot].append(token)
            assert len(self.held[slot]) <= self.context
        seen = {slot: self.decoder.logits(np.array(self.held[slot])) for slot in {s for _, s in order}}
        left = {slot: len(self.held[slot]) - sum(s == slot for _, s in order) for slot in seen}
        for _, slot in order:
            rows.append(seen[slot][left[slot]])
            left[slot] += 1
        return np.array(rows, np.float32)

    def logits(self, ids: Sequence[int], slot: int = 0) -> NDArray[np.float32]:
        return self.step(ids, [slot] * len(ids))

    def length(self, slot: int = 0) -> int:
        return len(self.held[slot])

    def truncate(self, slot: int, length: int) -> None:
        assert length <= len(self.held[slot])
        del self.held[slot][length:]

    def shortest(self, slot: int = 0) -> int:
        return 0

    def copy(self, source: int, target: int, length: int, common: int = 0) -> None:
        assert self.held[target][:common] == self.held[source][:common] and length <= len(self.held[source])
        self.held[target] = self.held[source][:length]

    def check(self, on: bool) -> None:
        assert not on


def dense_weights(files: ModelFiles, spec: DecoderSpec) -> dict:
    """Every weight as the interpreter takes it: float64, with its bias."""
    weights = {}
    for loaded in read_weights(files, spec):
        weight = dequantize(loaded.weight) if isinstance(loaded.weight, PackedTensor) else loaded.weight
        bias = None if loaded.bias is None else loaded.bias.float32().astype(np.float64)
        weights[loaded.role, loaded.layer] = (weight.float32().astype(np.float64), bias)
    return weights
