"""`model.generate(...)` of a transformers model, answered by the engine where it can answer.

The layers of a low-bit model hold their weights in the form that the engine reads, so the engine is given their addresses: nothing
is copied and nothing is loaded again. `EngineGenerate` stands as `generate` on one model. Each call is looked at once: request.py
gives the reason why transformers' own loop must run it (a keyword the engine does not know, hooks, adapters, another device), or
None. Greedy output and beams are the same token for token, up to the last bits of float arithmetic; draws come from the engine's
generator, seeded from torch's, so `torch.manual_seed` still repeats a text. A batch advances together, a slot of the engine for
each sequence, and reads the weights once for all.

    lowbit.explain(model).generate                    which of the two runs a plain call, and why
    model.generate(ids, prompt_lookup_num_tokens=4)   guesses that are checked in one step: the same text, sooner (guessing.py)
    model.generate(ids, prompt_cache="book.cache")    what was read of a prompt is kept in a file
    model.generate(ids, check=True)                   if a number overflows, say in which layer
    model.generate(ids, within_window=True)           refuse a prompt longer than the model's sliding window
"""

from __future__ import annotations

import copy
import dataclasses
import threading
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from lowbit.bridge import request as reading
from lowbit.bridge.clock import Clock
from lowbit.bridge.guessing import Draft, guesser
from lowbit.bridge.request import Request
from lowbit.bridge.weights import model_weights
from lowbit.core import threads
from lowbit.errors import LowbitError
from lowbit.layers import PackedWeight
from lowbit.runtime import beam
from lowbit.runtime.engine import Engine
from lowbit.runtime.generation import choose_tokens
from lowbit.runtime.prompt_cache import PromptCache
from lowbit.runtime.selection import Selector
from lowbit.runtime.slots import Floats, Slot, check_window
from lowbit.runtime.speculate import Guesser

SHORTEST_CONTEXT = 512
# transformers keeps keys and values as the model computes them, and these answers are to be its answers.
CACHE = "fp16"
# What `generate` takes and transformers' does not know.
OWN_KEYWORDS = ("prompt_cache", "check", "within_window")


class EngineGenerate:
    """Stands as `generate` on one model: the engine where it can, transformers' own loop elsewhere."""

    def __init__(self, model: nn.Module, cache: str = CACHE) -> None:
        self.model, self.cache = model, cache
        self.why_not: str | None = None
        self.guesser: Guesser | None = None  # that of the last call, with what became of its guesses
        self._engine: Engine | None = None
        self._state: list[tuple[int, int]] = []
        self._busy = threading.RLock()

    def __deepcopy__(self, memo: dict[int, Any]) -> EngineGenerate:
        return EngineGenerate(copy.deepcopy(self.model, memo), self.cache)

    def __reduce__(self) -> tuple[Any, ...]:
        return (EngineGenerate, (self.model, self.cache))

    @torch.no_grad()
    def __call__(self, inputs: Any = None, generation_config: Any = None, **kwargs: Any) -> Any:
        model = cast(Any, self.model)
        reading.refuse_what_is_no_prompt(kwargs.get("input_ids", inputs), kwargs)
        asked = {name: given for name in OWN_KEYWORDS if (given := kwargs.pop(name, None))}
        prompt_cache, check = asked.get("prompt_cache"), "check" in asked
        clock, draft = kwargs.pop("clock", None), _draft(kwargs)
        # One engine with one cache: a second thread's call waits until the first one's text is made.
        with self._busy:
            try:
                request, engine = self._read(inputs, generation_config, kwargs, check, draft)
                self.why_not = None
            except LowbitError as refusal:
                self.why_not, self.guesser = str(refusal), None
            else:
                if "within_window" in asked:
                    check_window(max(map(len, request.prompts)), engine.spec.shortest_window)
                engine.check(check)
                cache_file = None if prompt_cache is None else PromptCache(Path(prompt_cache))
                ids = kwargs.get("input_ids", inputs)
                return self._answer(engine, request, ids, cache_file, kwargs.get("streamer"), clock)
        if asked:
            raise LowbitError(f"{next(iter(asked))} needs the engine, which cannot run this call: {self.why_not}")
        for helper in (clock, draft):
            if helper is not None:
                helper.join(kwargs)
        return type(model).generate(model, inputs, generation_config, **kwargs)

    def _answer(
        self,
        engine: Engine,
        request: Request,
        ids: torch.Tensor,
        cache_file: PromptCache | None,
        streamer: Any,
        clock: Clock | None,
    ) -> torch.Tensor:
        """The rows of tokens that a call asks for, prompts first."""
        threads.follow(torch.get_num_threads())
        if streamer is not None:
            streamer.put(ids)
        found = (
            self._search(engine, request, cache_file, clock)
            if request.beams > 1
            else self._choose(engine, request, cache_file, streamer, clock)
        )
        if streamer is not None:
            streamer.end()
        return reading.fill_rows(found, request.fill, ids.dtype)

    def _read(
        self, inputs: Any, generation_config: Any, kwargs: dict[str, Any], check: bool, draft: Draft | None
    ) -> tuple[Request, Engine]:
        """A call as the engine takes it, and the engine; a LowbitError says why it does not."""
        ids, streamer = kwargs.get("input_ids", inputs), kwargs.get("streamer")
        extra = {k: v for k, v in kwargs.items() if k not in ("input_ids", "streamer")}
        _refuse(reading.input_refusal(ids, extra))
        config, rest = cast(Any, self.model)._prepare_generation_config(generation_config, **extra)
        _refuse(reading.config_refusal(config, rest))
        _refuse(self.model_refusal())
        mask = reading.attention_mask(ids, config, rest.get("attention_mask"))
        _refuse(reading.batch_refusal(ids, mask, self._parts[0], streamer, config.num_beams or 1))
        request = reading.read(ids, mask, config, kwargs.get("max_length"), check)
        engine = self.engine(request.length, request.slots)
        self.guesser = guesser(config, draft, request, engine)
        return request, engine

    def model_refusal(self) -> str | None:
        """Why the engine cannot run this model as it is now, or None."""
        model = cast(Any, self.model)
        if model.training:
            return "the model is in training mode; call model.eval()"
        for name, module in model.named_modules():
            if module._forward_hooks or module._forward_pre_hooks:
                return f"{name or 'the model'} has forward hooks, which the engine would pass by"
        if _state_of(model) != self._state:
            self.close()
            try:
                self._parts = model_weights(model)
            except LowbitError as error:
                return str(error)
            self._state = _state_of(model)  # transposed weights have moved
        return None

    def close(self) -> None:
        """Let the engine and its cache go; the next call makes another."""
        if self._engine is not None:
            self._engine.close()
        self._engine, self._state = None, []

    def engine(self, length: int, slots: int = 1) -> Engine:
        """The engine over this model's weights, empty, with room for so many sequences of a length."""
        now = self._engine
        if now is None or now.context < length or now.slots < slots:
            most = max(length, SHORTEST_CONTEXT, now.context if now else 0)
            if now is not None:
                now.close()  # its weights stay, they are the model's
                self._engine = None
            context = 1 << (most - 1).bit_length()
            self._engine = Engine(*self._parts, context=context, cache=self.cache, slots=slots, compute=self.compute)
        assert self._engine is not None
        for slot in range(self._engine.slots):
            self._engine.reset(slot)
        return self._engine

    @property
    def compute(self) -> str:
        """What the layers were asked to compute in, if all were asked alike."""
        asked = {w.compute for w in self.model.modules() if isinstance(w, PackedWeight)}
        return asked.pop() if len(asked) == 1 else "auto"

    def _search(
        self, engine: Engine, request: Request, cache_file: PromptCache | None, clock: Clock | None
    ) -> list[list[int]]:
        """The best beams of each prompt, one prompt after another."""
        rows = []
        for prompt, seen in zip(request.prompts, request.seen, strict=True):
            slots = [Slot(engine, number) for number in range(request.slots)]
            for slot in slots:
                slot.clear()
            if cache_file is not None:
                _read_through(cache_file, slots[0], prompt)
            tick = None if clock is None else clock.tick
            found = beam.search(slots, prompt, request.settings, seen, tick)[: request.returns]
            rows += [[*seen.tolist(), *best.tokens] for best in found]
        return rows

    def _choose(
        self, engine: Engine, request: Request, cache_file: PromptCache | None, streamer: Any, clock: Clock | None
    ) -> list[list[int]]:
        """Every sequence continued token by token, all in one step."""
        if self.guesser is not None:
            return [self._choose_guessed(engine, request, self.guesser, cache_file, streamer, clock)]
        selection, stops = request.settings.selection, request.settings.stop_tokens
        logits = self._prefill(engine, request, cache_file)
        rows = [seen.tolist() for seen in request.seen for _ in range(request.returns)]
        selectors = [Selector(selection.replace(seed=seed), stops) for seed in request.seeds]
        turn = _turning(engine, request)
        if request.slots == 1 and streamer is None and clock is None and turn is None:
            first = selectors[0].choose(logits[0], np.asarray(rows[0], np.int32))
            rows[0].append(first)
            left = request.settings.max_new_tokens - 1
            rest = engine.continue_chosen(selectors[0], rows[0], left, stops) if left and first not in stops else []
            return [rows[0] + rest]
        active = list(range(len(rows)))
        for made in range(1, request.settings.max_new_tokens + 1):
            for place, row in enumerate(active):
                rows[row].append(selectors[row].choose(logits[place], np.asarray(rows[row], np.int32)))
            if clock is not None:
                clock.tick()
            if streamer is not None:
                streamer.put(torch.tensor([rows[0][-1]]))
            active = [row for row in active if rows[row][-1] not in stops]
            if not active or made == request.settings.max_new_tokens:
                break
            if made + len(request.prompts[0]) == turn:
                logits = _read_again(engine, request, rows, active)
            else:
                logits = engine.step([rows[row][-1] for row in active], active)
        return rows

    def _choose_guessed(
        self,
        engine: Engine,
        request: Request,
        guesses: Guesser,
        cache_file: PromptCache | None,
        streamer: Any,
        clock: Clock | None,
    ) -> list[int]:
        """One sequence continued with guesses, as the runtime does it."""
        slot, prompt = Slot(engine), request.prompts[0]
        if cache_file is not None:
            _read_through(cache_file, slot, prompt)
        settings = dataclasses.replace(
            request.settings, selection=request.settings.selection.replace(seed=request.seeds[0])
        )
        row = [int(token) for token in prompt]
        for chosen in choose_tokens(slot, prompt, settings, guesses):
            row.append(chosen.token)
            if clock is not None:
                clock.tick()
            if streamer is not None:
                streamer.put(torch.tensor([chosen.token]))
        guesses.settle(np.asarray(row, np.int32))
        return row

    def _prefill(self, engine: Engine, request: Request, cache_file: PromptCache | None) -> Floats:
        """The logits after each prompt, once for every answer to it; slots lie in that order."""
        logits = []
        for index, prompt in enumerate(request.prompts):
            first = index * request.returns
            slot = Slot(engine, first)
            logits += [
                slot.advance(prompt) if cache_file is None else _read_through(cache_file, slot, prompt)
            ] * request.returns
            for copied in range(first + 1, first + request.returns):
                engine.copy(first, copied, len(prompt))
        return np.stack(logits)


def _turning(engine: Engine, request: Request) -> int | None:
    """The length within these answers at which a model with two tables of frequencies takes the other one, or None."""
    slot, prompt = Slot(engine), len(request.prompts[0])  # batches of such models are left to transformers
    within = prompt <= slot.fixed_until < prompt + request.settings.max_new_tokens
    return slot.fixed_until + 1 if slot.two_tables and within else None


def _read_again(engine: Engine, request: Request, rows: list[list[int]], active: list[int]) -> Floats:
    """The logits after texts whose keys in the cache are turned for shorter ones."""
    new = [rows[row][len(request.seen[0]) :] for row in active]
    texts = [np.asarray([*request.prompts[0], *tokens], np.int32) for tokens in new]
    return np.stack([Slot(engine, row).advance(text) for row, text in zip(active, texts, strict=True)])


def _state_of(model: nn.Module) -> list[tuple[int, int]]:
    """Where every tensor lies and how often it was written to: an engine made for another state would answer from the past."""
    return [(t.data_ptr(), t._version) for t in (*model.parameters(), *model.buffers())]


def _draft(keywords: dict[str, Any]) -> Draft | None:
    """The model that guesses in a call, taken out of its keywords: a `Draft`, or what transformers calls an assistant."""
    assistant, draft = keywords.pop("assistant_model", None), keywords.pop("draft", None)
    return draft if draft is not None or assistant is None else Draft.of(assistant)


def _refuse(reason: str | None) -> None:
    if reason is not None:
        raise LowbitError(reason)


def _read_through(cache_file: PromptCache, slot: Slot, prompt: Any) -> Floats:
    """Read a prompt with what a file holds of it, and leave the rest there."""
    cache_file.read(slot, prompt)
    logits = slot.advance(prompt)
    cache_file.write(slot, prompt)
    return logits


def attach_engine(model: nn.Module) -> None:
    """Let the engine answer this model's `generate` where it can. Models that do not generate are left alone."""
    if hasattr(type(model), "_prepare_generation_config"):
        model.generate = EngineGenerate(model)  # type: ignore[assignment]


def timed_generate(model: Any, *arguments: Any, **keywords: Any) -> tuple[Any, list[float]]:
    """What `model.generate` returns, and the seconds from the start to each of its steps, whichever loop runs it."""
    clock = Clock()
    if isinstance(model.generate, EngineGenerate):
        return model.generate(*arguments, clock=clock, **keywords), clock.seconds
    clock.join(keywords)
    return model.generate(*arguments, **keywords), clock.seconds
