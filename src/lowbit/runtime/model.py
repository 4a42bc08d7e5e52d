"""A model ready to answer, without torch.

    model = load("folder")                      # or a .gguf file; load(folder, format="int4") makes it low-bit on the way
    model.generate("Once upon a time").text
    for piece in model.stream("Once upon a time"): print(piece, end="")
    model.chat([{"role": "user", "content": "Hello"}]).text

Settings are named as in transformers' generate and belong to a call: `model.generate(prompt, max_new_tokens=20, temperature=0.7)`;
what a call leaves open is as generation_config.json says. A prompt is text or token numbers.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowbit.errors import LowbitError
from lowbit.models.spec import DecoderSpec
from lowbit.runtime import beam
from lowbit.runtime.embedding import Embedder, Pooling
from lowbit.runtime.generation import Answer, Chosen, Guess, Piece, answer_pieces, choose_tokens, join
from lowbit.runtime.settings import Settings
from lowbit.runtime.slots import Engine, Floats, Slot, Tokens, check_prompt, check_window
from lowbit.runtime.speculate import DraftModel, PromptLookup
from lowbit.runtime.text import Message, Tokenizer

if TYPE_CHECKING:
    from lowbit.runtime.prompt_cache import PromptCache

Prompt = str | Sequence[int] | Tokens


class Model:
    """An engine, its tokenizer, and how it answers unless told otherwise.

    Several threads may use one model: each answer takes a slot of the engine for itself, or waits for one.
    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer | None = None, settings: Settings | None = None) -> None:
        self.engine = engine
        self._tokenizer = tokenizer
        self.settings = settings if settings is not None else Settings(stop_tokens=engine.spec.tokens.eos)
        self.slots = [Slot(engine, number) for number in range(engine.slots)]
        self.notes: list[str] = []
        self.check_files: Callable[[], None] = lambda: None
        self.make_embedder: Callable[[], Embedder] | None = None
        self._embedder: Embedder | None = None
        self._lock = threading.Lock()

    @property
    def spec(self) -> DecoderSpec:
        return self.engine.spec

    @property
    def context(self) -> int:
        """How many tokens a prompt and its answer may have together."""
        return self.engine.context

    @property
    def tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            raise LowbitError(
                "the model has no tokenizer.json: give it token numbers, or copy the original's tokenizer.json beside it"
            )
        return self._tokenizer

    def encode(self, prompt: Prompt) -> Tokens:
        """A prompt as tokens that the engine takes."""
        return self._read_prompt(prompt, self.settings)

    def _read_prompt(self, prompt: Prompt, settings: Settings, spare: int = 0) -> Tokens:
        """A prompt as tokens; `spare` is 1 where no answer follows and it may fill the whole context."""
        self.check_files()
        tokens = self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        checked = check_prompt(tokens, self.spec.vocab_size, self.context + spare, self.spec.max_positions)
        if settings.within_window:
            check_window(len(checked), self.spec.shortest_window)
        return checked

    def stream(
        self, prompt: Prompt, *, draft: Model | None = None, prompt_cache: str | Path | None = None, **settings: Any
    ) -> Iterator[Piece]:
        """An answer, piece by piece as it is made. Closing the iterator stops the work.

        With a `prompt_cache` file, what it holds of the prompt is not read again, and what was read of it is written there.
        """
        chosen = self.settings.change(**settings)
        if chosen.beams.num_beams > 1:
            raise LowbitError("beam search has no text before its end: use generate, or num_beams=1 to stream")
        tokens = self._read_prompt(prompt, chosen)
        return self._pieces(tokens, chosen, draft, self._cache_file(prompt_cache))

    def generate(
        self, prompt: Prompt, *, draft: Model | None = None, prompt_cache: str | Path | None = None, **settings: Any
    ) -> Answer:
        """A whole answer. With `num_beams` the likeliest that beam search finds; with a `draft` model, or a `prompt_cache`
        file that holds the start of the prompt, the same answer sooner."""
        chosen = self.settings.change(**settings)
        tokens = self._read_prompt(prompt, chosen)
        if chosen.beams.num_beams > 1:
            return self._beams(tokens, chosen, self._cache_file(prompt_cache))[0]
        return join(self._pieces(tokens, chosen, draft, self._cache_file(prompt_cache)), len(tokens))

    def beams(self, prompt: Prompt, **settings: Any) -> list[Answer]:
        """The `num_return_sequences` best answers of a beam search, best first, each with its score."""
        chosen = self.settings.change(**settings)
        return self._beams(self._read_prompt(prompt, chosen), chosen, None)

    def _beams(self, tokens: Tokens, chosen: Settings, cache_file: PromptCache | None) -> list[Answer]:
        with self._lock:
            self.engine.check(chosen.check)
            if cache_file is not None:
                cache_file.read(self.slots[0], tokens)
            found = beam.search(self.slots, tokens, chosen)
            if cache_file is not None:
                self.slots[0].advance(tokens)
                cache_file.write(self.slots[0], tokens)
        return [self._beam_answer(each, tokens, chosen) for each in found[: chosen.beams.num_return_sequences]]

    def chat(self, messages: Sequence[Message] | str, **settings: Any) -> Answer:
        """The answer to a conversation, in the form that the model was trained on. A text is one message of a user."""
        return self.generate(self.chat_prompt(messages), **settings)

    def chat_stream(self, messages: Sequence[Message] | str, **settings: Any) -> Iterator[Piece]:
        """As `chat`, piece by piece."""
        return self.stream(self.chat_prompt(messages), **settings)

    def chat_prompt(self, messages: Sequence[Message] | str) -> list[int]:
        """A conversation as tokens, up to where the model speaks."""
        conversation = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
        return self.tokenizer.encode_chat(conversation)

    def logits(self, prompt: Prompt) -> Floats:
        """The logits after every token of a text, [tokens, vocabulary]."""
        tokens = self._read_prompt(prompt, self.settings, spare=1)
        slot = self.slots[0]
        with self._lock:
            slot.clear()
            self.engine.check(self.settings.check)
            return self.engine.logits(tokens)

    def forget(self) -> None:
        """Empty every slot: the next prompt is read from its first token on."""
        with self._lock:
            for slot in self.slots:
                slot.clear()

    def embed(self, prompt: Prompt, pooling: Pooling = "mean", normalize: bool = True) -> Floats:
        """A text as one vector [hidden size]: the mean of the last layer's states, or the last one; of length 1 if normalised."""
        tokens = self._read_prompt(prompt, self.settings, spare=1)
        with self._lock:
            if self._embedder is None:
                if self.make_embedder is None:
                    raise LowbitError(
                        "this model was made from an engine alone: load it with lowbit.runtime.load to embed text"
                    )
                self._embedder = self.make_embedder()
            return self._embedder.embed(tokens, pooling, normalize)

    def _cache_file(self, path: str | Path | None) -> PromptCache | None:
        if path is None:
            return None
        from lowbit.runtime.prompt_cache import PromptCache  # safetensors' writer, which few answers need

        return PromptCache(Path(path))

    def _pieces(
        self, tokens: Tokens, settings: Settings, draft: Model | None, cache_file: PromptCache | None
    ) -> Iterator[Piece]:
        guess: Guess | None = None
        if draft is not None:
            if not isinstance(draft, Model):
                raise LowbitError(f"draft={draft!r} is no model: load the one that guesses with lowbit.runtime.load")
            guess = DraftModel(draft.slots[0], settings.num_assistant_tokens, self.spec.vocab_size)
        elif settings.prompt_lookup_num_tokens:
            guess = PromptLookup(settings.prompt_lookup_num_tokens)
        chosen = self._one_at_a_time(tokens, settings, guess, cache_file)
        room = min(settings.max_new_tokens, self.context - len(tokens))
        if self._tokenizer is None:
            return _without_text(chosen, settings, room)
        return answer_pieces(chosen, self._tokenizer, settings, room)

    def _one_at_a_time(
        self, tokens: Tokens, settings: Settings, guess: Guess | None, cache_file: PromptCache | None
    ) -> Iterator[Chosen]:
        """Tokens, each made with the engine for itself: between two tokens another thread may have its turn."""
        slot = self._take_slot(tokens)
        try:
            if cache_file is not None:
                with self._lock:
                    cache_file.read(slot, tokens)
            chosen = choose_tokens(slot, tokens, settings, guess)
            while True:
                with self._lock:
                    self.engine.check(settings.check)
                    token = next(chosen, None)
                    if cache_file is not None:
                        cache_file.write(slot, tokens)
                        cache_file = None
                if token is None:
                    return
                yield token
        finally:
            slot.readers -= 1

    def _take_slot(self, tokens: Tokens) -> Slot:
        """The slot with the fewest answers under way, and among those the one that holds most of a prompt already."""
        with self._lock:
            slot = min(self.slots, key=lambda s: (s.readers, -s.common(tokens), len(s.tokens)))
            slot.readers += 1
        return slot

    def _beam_answer(self, found: beam.Beam, prompt: Tokens, settings: Settings) -> Answer:
        ended = bool(found.tokens) and found.tokens[-1] in settings.ends
        text = "" if self._tokenizer is None else self._tokenizer.decode(found.tokens[:-1] if ended else found.tokens)
        return Answer(text, found.tokens, "stop" if ended else "length", len(prompt), score=found.score)


def _without_text(chosen: Iterator[Chosen], settings: Settings, room: int) -> Iterator[Piece]:
    """Pieces of a model without a tokenizer."""
    for count, choice in enumerate(chosen, 1):
        ended = choice.token in settings.ends
        yield Piece("", choice, "stop" if ended else "length" if count == room else None)
