"""A model of transformers ready to answer: loading, prompts, streaming.

    session = Session.load(find_source("./small"), LoadOptions())
    answer = session.generate(session.encode("Why is the sky blue?"), Sampling(), emit=print)

Commands get a session from `engines.open_session`: this one, or `engine_session.EngineSession`, which has the same
face and runs the model without torch. Text is handed out in the thread that asked for it: Ctrl-C is an ordinary
KeyboardInterrupt in the middle of an answer.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import torch
import transformers
from jinja2 import TemplateError
from transformers.generation import BaseStreamer

import lowbit
from lowbit.bench import peak_memory
from lowbit.checkpoint.gguf_source import gguf_tokenizer
from lowbit.checkpoint.verdict import one_sentence
from lowbit.cli.answer import ONE_TEXT, Answer, Emit, Message
from lowbit.cli.options import LoadOptions, Sampling
from lowbit.cli.source import Source
from lowbit.core.library import library_path
from lowbit.core.threads import set_threads
from lowbit.errors import BareErrors, CheckpointError, LowbitError, one_line
from lowbit.runtime.text import TextPieces

# Files that say a folder has a tokenizer, of whatever kind.
_TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges.txt", "*.model", "*.tiktoken", "tokenization*.py")


class _Stream(BaseStreamer):  # type: ignore[misc]
    """Receives tokens from `generate`: notes when each came, hands its text on."""

    def __init__(self, pieces: TextPieces, emit: Emit | None) -> None:
        self.pieces, self.emit = pieces, emit
        self.text: list[str] = []
        self.token_seconds: list[float] = []
        self.start = time.perf_counter()
        self.seen_prompt = False

    def put(self, value: torch.Tensor) -> None:
        if not self.seen_prompt:
            self.seen_prompt = True
            return
        self.token_seconds.append(time.perf_counter() - self.start)
        for token in value.flatten().tolist():
            self._hand_on(self.pieces.add(token))

    def end(self) -> None:
        self._hand_on(self.pieces.rest())

    def _hand_on(self, piece: str) -> None:
        if piece:
            self.text.append(piece)
            if self.emit is not None:
                self.emit(piece)


class Session:
    """A loaded model and its tokenizer."""

    def __init__(self, model: Any, tokenizer: Any, load_seconds: float = 0.0) -> None:
        self.model, self.tokenizer, self.load_seconds = model, tokenizer, load_seconds

    @classmethod
    def load(cls, source: Source, options: LoadOptions, **more: Any) -> Session:
        """Both from one source. `more`: further keywords of from_pretrained."""
        start = time.perf_counter()
        model = load_model(source, options, **more)
        tokenizer = load_tokenizer(source, options)
        if tokenizer is None:
            raise CheckpointError(
                f"{source.name} has no tokenizer: copy the tokenizer*.json files of the original beside it"
            )
        return cls(model.eval(), tokenizer, time.perf_counter() - start)

    @property
    def context_length(self) -> int | None:
        """How many tokens the model was made for."""
        return context_of(self.model)

    @property
    def vocabulary(self) -> int:
        """How many tokens the model knows."""
        return int(self.model.config.get_text_config().vocab_size)

    def plain_tokens(self, text: str) -> list[int]:
        """The tokens of a text and no special ones."""
        return [int(t) for t in self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]]

    def peak_memory(self) -> int:
        """The most memory used so far: of the GPU if the model is on one, else of this process."""
        if self.model.device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self.model.device))
        return peak_memory()

    def encode(self, prompt: str, system: str | None = None, raw: bool = False) -> list[int]:
        """A prompt as tokens: as a user's message if there is a chat template, else, or if `raw`, as it stands."""
        if raw or not self.tokenizer.chat_template:
            return [int(t) for t in self.tokenizer(prompt)["input_ids"]]
        opening = [{"role": "system", "content": system}] if system else []
        return self.encode_chat([*opening, {"role": "user", "content": prompt}])

    def encode_chat(self, messages: list[Message]) -> list[int]:
        """A conversation as tokens, up to where the model speaks."""
        if not self.tokenizer.chat_template:
            spoken = "".join(f"{m['role']}: {m['content']}\n" for m in messages)
            return [int(t) for t in self.tokenizer(spoken + "assistant:")["input_ids"]]
        try:
            encoded = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
        except TemplateError as error:
            raise LowbitError(f"the model's chat template refuses this conversation: {one_line(str(error))}") from None
        return [int(t) for t in encoded["input_ids"]]

    def generate(self, prompt: list[int], sampling: Sampling, emit: Emit | None = None) -> Answer:
        """Answer a prompt; each piece of text goes to `emit` as it comes."""
        self._check_room(len(prompt))
        if sampling.prompt_cache is not None:
            raise LowbitError(
                "--prompt-cache belongs to lowbit's own engine, and this model runs through transformers: add --engine lowbit"
            )
        if sampling.seed is not None:
            torch.manual_seed(sampling.seed)
        pieces = TextPieces(lambda tokens: str(self.tokenizer.decode(tokens, skip_special_tokens=True)))
        stream = _Stream(pieces, emit)
        ids = torch.tensor([prompt], device=self.model.device)
        try:
            with torch.inference_mode():
                self.model.generate(
                    ids, attention_mask=torch.ones_like(ids), streamer=stream, **self._arguments(sampling)
                )
        except ValueError as error:  # what transformers says of settings that are out of range
            raise LowbitError(f"the model cannot answer with these settings: {one_line(str(error))}") from error
        return Answer("".join(stream.text), len(prompt), tuple(stream.token_seconds))

    def forget(self) -> None:
        """Nothing of earlier prompts is kept between calls."""

    def _check_room(self, prompt_tokens: int) -> None:
        if not prompt_tokens:
            raise LowbitError("the prompt is empty: give the model some text to answer")
        if self.context_length is not None and prompt_tokens >= self.context_length:
            raise LowbitError(
                f"the text has {prompt_tokens} tokens, and the model was made for {self.context_length}: shorten it"
            )

    def _arguments(self, sampling: Sampling) -> dict[str, Any]:
        given = {
            "temperature": sampling.temperature,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
        }
        drawn = {name: value for name, value in given.items() if value is not None}
        arguments: dict[str, Any] = {"max_new_tokens": sampling.max_new_tokens, **ONE_TEXT}
        if sampling.temperature == 0:
            arguments |= {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
        elif drawn:
            arguments |= {"do_sample": True, **drawn}
        if sampling.repetition_penalty is not None:
            arguments["repetition_penalty"] = sampling.repetition_penalty
        if sampling.ignore_end:
            arguments["min_new_tokens"] = sampling.max_new_tokens
        if self.model.generation_config.pad_token_id is None:
            end = self.model.generation_config.eos_token_id
            arguments["pad_token_id"] = end[0] if isinstance(end, list) else end
        return arguments


def context_of(model: Any) -> int | None:
    """How many tokens a model was made for, if its configuration says it."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def load_model(source: Source, options: LoadOptions, **more: Any) -> Any:
    """A model, made low-bit while it loads if there is a recipe. `more`: further keywords of from_pretrained."""
    arguments: dict[str, Any] = {"dtype": options.dtype, "trust_remote_code": options.trust_remote_code, **more}
    if options.device is not None:
        arguments["device_map"] = _checked_device(options.device)
    if options.recipe is not None:
        refuse_low_bit(source)
        arguments["recipe"] = options.recipe
    if options.imatrix is not None:
        arguments["imatrix"] = options.imatrix
    # Asked for by name, since the bars of transformers are switched off.
    arguments["progress"] = sys.stderr.isatty()
    with one_sentence(source.name):
        return lowbit.AutoModelForCausalLM.from_pretrained(source.name, allow_pickle=options.allow_pickle, **arguments)


def refuse_low_bit(source: Source) -> None:
    """A model that was rounded once is no source for rounding it again."""
    quantization = source.config().get("quantization_config")
    if isinstance(quantization, dict):
        method = quantization.get("quant_method", "another tool")
        raise CheckpointError(
            f"{source.name} is low-bit already ({method}): start from the model that it was made from"
        )


def load_tokenizer(source: Source, options: LoadOptions) -> Any | None:
    """The tokenizer of a model, or None if it has none."""
    if source.kind == "gguf":
        return gguf_tokenizer(source.path)
    is_folder = source.kind == "folder"
    if is_folder and not any(file for pattern in _TOKENIZER_FILES for file in source.path.glob(pattern)):
        return None
    damage = f"{source.name}: its tokenizer cannot be read, a file of it may be damaged"
    try:
        with BareErrors(damage), one_sentence(f"the tokenizer of {source.name}", is_folder):
            found = transformers.AutoTokenizer.from_pretrained(source.name, trust_remote_code=options.trust_remote_code)
            if not isinstance(found.model_max_length, int | float):
                raise CheckpointError(f"{damage}: it says model_max_length = {found.model_max_length!r}")
            return found
    except (OSError, ValueError):  # transformers has no error of its own for a model of the hub without a tokenizer
        if is_folder:
            raise
    return None


def prepare_torch(threads: int | None) -> None:
    """Settings for the whole process: threads, and no chatter of transformers between our lines.

    What transformers imports when it is first used is imported here, where the user is told what he waits for.
    """
    _ = lowbit.AutoModelForCausalLM, transformers.AutoTokenizer, transformers.GenerationMixin
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if threads is not None:
        torch.set_num_threads(threads)
        if library_path() is not None:
            set_threads(threads)


def _checked_device(name: str) -> str:
    """The device if it is there; else a sentence, before a model is read for nothing."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise LowbitError(f"there is no device {name!r}: use cpu, cuda, cuda:1 or xpu") from None
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "xpu": torch.xpu.is_available()}
    if not available.get(device.type, True):
        raise LowbitError(f"torch sees no {device.type} device here: leave --device out, or see 'lowbit doctor'")
    return name
