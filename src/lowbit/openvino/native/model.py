"""The runtime's model with adapters: which of them are on is a matter of each call.

model = load(folder, adapters={"legal": "legal_lora", "short": "short_lora"})
model.generate(prompt)                                       # all of them
model.generate(prompt, adapters="legal")                     # this one
model.generate(prompt, adapters={"legal": 0.5, "short": 1})  # both, one at half its strength
model.generate(prompt, adapters=())                          # none
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from lowbit.errors import LowbitError
from lowbit.openvino.native.adapters import Adapters
from lowbit.openvino.native.engine import IrEngine
from lowbit.runtime.generation import Answer, Piece
from lowbit.runtime.model import Model, Prompt
from lowbit.runtime.settings import Settings
from lowbit.runtime.slots import Floats
from lowbit.runtime.text import Tokenizer

Wanted = str | Collection[str] | Mapping[str, float] | None


class AdaptedModel(Model):
    """A model whose engine is a graph of OpenVINO; the engine's other users see an ordinary model."""

    engine: IrEngine

    def __init__(
        self, engine: IrEngine, adapters: Adapters, tokenizer: Tokenizer | None = None, settings: Settings | None = None
    ) -> None:
        super().__init__(engine, tokenizer, settings)
        self.adapters = adapters
        self._on: Mapping[str, float] | None = None
        self._switch(None)

    def stream(self, prompt: Prompt, *, adapters: Wanted = None, **settings: Any) -> Iterator[Piece]:
        return self._switched(adapters, super().stream(prompt, **settings))

    def generate(self, prompt: Prompt, *, adapters: Wanted = None, **settings: Any) -> Answer:
        self._switch(adapters)
        return super().generate(prompt, **settings)

    def beams(self, prompt: Prompt, *, adapters: Wanted = None, **settings: Any) -> list[Answer]:
        self._switch(adapters)
        return super().beams(prompt, **settings)

    def logits(self, prompt: Prompt, *, adapters: Wanted = None) -> Floats:
        self._switch(adapters)
        return super().logits(prompt)

    def _switched(self, adapters: Wanted, pieces: Iterator[Piece]) -> Iterator[Piece]:
        self._switch(adapters)
        yield from pieces

    def _switch(self, wanted: Wanted) -> None:
        """Put the wanted adapters on. What the slots hold was read with others, and is forgotten."""
        weights = self.adapters.weights(wanted)
        with self._lock:
            if weights == self._on:
                return
            if any(slot.readers for slot in self.slots):
                raise LowbitError(
                    "an answer with other adapters is under way: read it to its end or close it, or load the model twice"
                )
            self.engine.lasting, self._on = self.adapters.tensors(weights), weights
            self.engine.clear()
