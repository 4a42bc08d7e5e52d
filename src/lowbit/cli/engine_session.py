"""A model of lowbit's own engine ready to answer, without torch: the same face as `session.Session`."""

from __future__ import annotations

import time
from typing import Any

from lowbit.bench import peak_memory
from lowbit.cli.answer import ONE_TEXT, Answer, Emit, Message
from lowbit.cli.options import LoadOptions, Sampling
from lowbit.core.threads import set_threads
from lowbit.errors import LowbitError
from lowbit.runtime import Model, Tokenizer
from lowbit.runtime.engine import Engine
from lowbit.runtime.files import ModelFiles
from lowbit.runtime.loading import load_files

_SAMPLING = ("max_new_tokens", "temperature", "top_k", "top_p", "repetition_penalty", "seed", "prompt_cache")


class EngineSession:
    """A loaded model and its tokenizer."""

    def __init__(self, model: Model, load_seconds: float = 0.0) -> None:
        self.model, self.load_seconds = model, load_seconds
        self.tokenizer: Tokenizer = model.tokenizer  # a model without one is refused before anybody types a message

    @classmethod
    def load(cls, files: ModelFiles, options: LoadOptions, threads: int | None = None) -> EngineSession:
        start = time.perf_counter()
        if threads is not None:
            set_threads(threads)
        model = load_files(files, options.recipe, options.context, cache=options.cache, mapped=options.mapped)
        model.settings = model.settings.change(check=options.check, within_window=options.within_window)
        return cls(model, time.perf_counter() - start)

    @property
    def context_length(self) -> int | None:
        """How many tokens a prompt and its answer may have together."""
        return self.model.context

    @property
    def cache(self) -> str:
        """The type of the keys and values that are kept."""
        return self.engine.cache

    @property
    def engine(self) -> Engine:
        if not isinstance(self.model.engine, Engine):
            raise LowbitError("this model runs in an engine of another kind, which has neither profile nor cache types")
        return self.model.engine

    @property
    def vocabulary(self) -> int:
        """How many tokens the model knows."""
        return self.model.spec.vocab_size

    def plain_tokens(self, text: str) -> list[int]:
        """The tokens of a text and no special ones."""
        return self.tokenizer.encode(text, special=False)

    def peak_memory(self) -> int:
        """The most memory that this process has used so far."""
        return peak_memory()

    def encode(self, prompt: str, system: str | None = None, raw: bool = False) -> list[int]:
        """A prompt as tokens: as a user's message if there is a chat template, else, or if `raw`, as it stands."""
        if raw or self.tokenizer.template is None:
            return self.tokenizer.encode(prompt)
        opening = [{"role": "system", "content": system}] if system else []
        return self.encode_chat([*opening, {"role": "user", "content": prompt}])

    def encode_chat(self, messages: list[Message]) -> list[int]:
        """A conversation as tokens, up to where the model speaks."""
        return self.model.chat_prompt(messages)

    def generate(self, prompt: list[int], sampling: Sampling, emit: Emit | None = None) -> Answer:
        """Answer a prompt; each piece of text goes to `emit` as it comes."""
        text: list[str] = []
        seconds: list[float] = []
        start = time.perf_counter()
        for piece in self.model.stream(prompt, **_settings(sampling)):
            seconds.append(time.perf_counter() - start)
            if piece.text:
                text.append(piece.text)
                if emit is not None:
                    emit(piece.text)
        return Answer("".join(text), len(prompt), tuple(seconds))

    def forget(self) -> None:
        """Keep nothing of earlier prompts, so that the next one is read whole (timings)."""
        self.model.forget()

    def profile(self, prompt: list[int], new_tokens: int) -> tuple[dict[str, int], dict[str, int]]:
        """Nanoseconds of one thread by part of a step, while a prompt is read and while the later tokens are made."""
        engine = self.engine
        self.forget()
        engine.reset()
        engine.profile(True)
        token = int(engine.prefill(prompt).argmax())
        reading = engine.profile(True)
        engine.continue_greedy(token, new_tokens - 1)
        later = engine.profile(False)
        engine.reset()
        return reading, later


def _settings(sampling: Sampling) -> dict[str, Any]:
    """What a user asked for, under the engine's names; what was left open stays the model's own."""
    given = {name: getattr(sampling, name) for name in _SAMPLING}
    chosen = {name: value for name, value in given.items() if value is not None}
    return {**ONE_TEXT, **chosen, "ignore_end": sampling.ignore_end}
