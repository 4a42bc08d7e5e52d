"""The engine on a CPU: a spec and weights in, logits out, with its own cache of keys and values.

    engine = Engine(spec, weights, context=2048)
    logits = engine.prefill(ids)            # [vocab], of the last position
    logits = engine.decode(token)           # one more token
    tokens = engine.generate(ids, 100)      # greedy, without Python between the tokens

A `slot` is one sequence in the cache. Several advance together with `step`, each at its own position, and the weights are then
read once for all of them; a slot is free again after `reset`. Ctrl-C ends the call within a layer and leaves the slots as they
were before it.
"""

from __future__ import annotations

import ctypes
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait

import numpy as np
from numpy.typing import NDArray

from lowbit.core import calls
from lowbit.core.calls import COMPUTES
from lowbit.core.library import last_error
from lowbit.errors import KernelError, LowbitError, RecipeError, nearest
from lowbit.models.spec import DecoderSpec
from lowbit.runtime import abi
from lowbit.runtime.describe import Description
from lowbit.runtime.selection import Selector
from lowbit.runtime.weights import EngineWeights, Floats, fingerprint

# int8 per head and token where products round their inputs to int8 anyway, fp16 elsewhere: benchmarks/results/cache_kl.md says what
# it costs.
DEFAULT_CACHE = "auto"
# Tokens of one step: as many as keep the activations of a layer in the second-level caches, where a narrow model reads a prompt
# of 512 tokens 4 to 6% faster than with twice as many (docs/notes/cpu_engine.md). Not so where weights are folded,
# which costs the less the more tokens share it.
LONGEST_CHUNK = 512
NARROW, NARROW_CHUNK = 1024, 256
# A step that takes longer than this runs beside the main thread, so that Ctrl-C ends it; the detour costs 0.05 ms.
NOTICED_SECONDS = 0.05
LONGEST_SLEEP = 0.1
LOWBIT_OK = 0

Tokens = Sequence[int] | NDArray[np.integer]


class Engine:
    """One model at work on the processor."""

    def __init__(
        self,
        spec: DecoderSpec,
        weights: EngineWeights,
        context: int,
        cache: str = DEFAULT_CACHE,
        slots: int = 1,
        compute: str = "auto",
    ) -> None:
        if cache not in abi.CACHE_TYPES:
            raise RecipeError(f"no cache is of type {cache!r}: {nearest(cache, abi.CACHE_TYPES)}")
        if compute not in COMPUTES:
            raise RecipeError(f"the engine cannot compute in {compute!r}: {nearest(compute, COMPUTES)}")
        self.spec, self.context, self.slots, self.vocab_size = spec, context, slots, spec.vocab_size
        self._fingerprint: str | None = None
        narrow = spec.hidden_size < NARROW and not (compute == "auto" and calls.fold_length())
        longest = NARROW_CHUNK if narrow else LONGEST_CHUNK
        self.chunk = max(1, min(longest, context)) if slots == 1 else max(LONGEST_CHUNK, slots)
        self._core = abi.engine_library()
        calls.say_if_slow()
        self._description = Description(spec, weights)  # keeps the weights alive
        options = abi.COptions(context, slots, abi.CACHE_TYPES.index(cache), COMPUTES[compute], self.chunk)
        self._handle: int | None = self._core.lowbit_engine_create(self._description.model, options)
        if not self._handle:
            raise RecipeError(last_error())
        self.cache = abi.CACHE_TYPES[self._core.lowbit_engine_cache_type(self._handle)]
        self._beside: tuple[int, ThreadPoolExecutor] | None = None
        self._step_seconds = math.inf  # of the last small step: before the first one nobody knows

    def close(self) -> None:
        """Free the cache and the buffers. The weights are the caller's."""
        if self._handle:
            if self._beside is not None and self._beside[0] == os.getpid():
                self._beside[1].shutdown(wait=not sys.is_finalizing())  # its thread has ended where Python ends
            self._core.lowbit_engine_destroy(self._handle)
            self._handle = None

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            self.close()

    def prefill(self, ids: Tokens, slot: int = 0) -> Floats:
        """Append tokens to a slot; the logits [vocab] after the last one."""
        last: Floats = self._append(ids, slot, every=False)[-1]
        return last

    def logits(self, ids: Tokens, slot: int = 0) -> Floats:
        """Append tokens to a slot; the logits [tokens, vocab] after each."""
        return self._append(ids, slot, every=True)

    def decode(self, token: int, slot: int = 0) -> Floats:
        """Append one token; the logits [vocab] after it."""
        only: Floats = self.step([token], [slot])[0]
        return only

    def step(self, tokens: Tokens, slots: Tokens) -> Floats:
        """Append one token (or a stretch of neighbours) to each slot named; the logits [tokens, vocab] in that order."""
        ids, places = _integers(tokens), _integers(slots)
        if ids.shape != places.shape:
            raise RecipeError(f"{ids.size} tokens for {places.size} slots; name the slot of each token")
        parts = [slice(start, start + self.chunk) for start in range(0, max(ids.size, 1), self.chunk)]
        return np.concatenate(
            [self._step(ids[part], places[part], np.ones(ids[part].size, np.uint8)) for part in parts]
        )

    def generate(self, ids: Tokens, count: int, stops: Tokens = (), slot: int = 0) -> list[int]:
        """Append a prompt and then the most likely token `count` times, or until one of `stops`; the new tokens.

        The last token made is not in the cache yet: continue with it.
        """
        token = int(np.argmax(self.prefill(ids, slot)))
        if count <= 1 or token in stops:
            return [token][:count]
        return [token, *self.continue_greedy(token, count - 1, stops, slot)]

    def continue_greedy(self, token: int, count: int, stops: Tokens = (), slot: int = 0) -> list[int]:
        """Append `token` and make the most likely next one, `count` times or until one of `stops`."""
        made, found = np.empty(count, np.int32), ctypes.c_int64()
        ends = _integers(stops)

        def call() -> int:
            return int(
                self._core.lowbit_engine_greedy(
                    self._open(), slot, token, count, ends.ctypes.data, ends.size, made.ctypes.data, found
                )
            )

        self._run_or_return(call, slot)
        return [int(t) for t in made[: found.value]]

    def continue_chosen(
        self, selector: Selector, tokens: Sequence[int], count: int, stops: Tokens = (), slot: int = 0
    ) -> list[int]:
        """As `continue_greedy` from the last of `tokens`, each new one chosen by a selector that looks at all before it."""
        length, found, ends = len(tokens), ctypes.c_int64(), _integers(stops)
        room = np.concatenate([_integers(tokens), np.empty(count, np.int32)])
        least = max(selector.selection.min_new_tokens - selector.chosen, 0)

        def call() -> int:
            return int(
                self._core.lowbit_engine_choose(
                    self._open(), slot, room.ctypes.data, length, count, selector.address, least, ends.ctypes.data,
                    ends.size, ctypes.byref(selector.generator), found,
                )
            )  # fmt: skip

        self._run_or_return(call, slot)
        selector.chosen += found.value
        return [int(t) for t in room[length : length + found.value]]

    def length(self, slot: int = 0) -> int:
        """Tokens in a slot."""
        length = int(self._core.lowbit_engine_length(self._open(), slot))
        if length < 0:
            raise RecipeError(last_error())
        return length

    def truncate(self, slot: int, length: int) -> None:
        """Forget what follows the first `length` tokens of a slot."""
        self._check(self._core.lowbit_engine_truncate(self._open(), slot, length))

    def shortest(self, slot: int = 0) -> int:
        """The fewest tokens above none that a slot can be cut to: sliding windows keep only what comes after."""
        return int(self._core.lowbit_engine_shortest(self._open(), slot))

    def reset(self, slot: int = 0) -> None:
        self.truncate(slot, 0)

    def copy(self, source: int, target: int, length: int, common: int = 0) -> None:
        """Make a slot hold the first `length` tokens of another one, the first `common` of which it holds already."""
        self._check(self._core.lowbit_engine_copy(self._open(), source, target, common, length))

    def save(self, slot: int = 0, length: int | None = None) -> NDArray[np.uint8]:
        """What a slot holds of its first tokens, as bytes that `restore` takes."""
        count = self.length(slot) if length is None else length
        size = ctypes.c_int64()
        self._check(self._core.lowbit_engine_save(self._open(), slot, count, None, size))
        saved = np.empty(size.value, np.uint8)
        self._check(self._core.lowbit_engine_save(self._open(), slot, count, saved.ctypes.data, size))
        return saved

    def restore(self, saved: NDArray[np.uint8], length: int, slot: int = 0) -> None:
        """Make a slot hold the `length` tokens that were saved."""
        flat = np.ascontiguousarray(saved)
        self._check(self._core.lowbit_engine_restore(self._open(), slot, length, flat.ctypes.data, flat.size))

    @property
    def identity(self) -> dict[str, str]:
        """What must be equal for an engine to take up what another one saved."""
        if self._fingerprint is None:
            self._fingerprint = fingerprint(self.spec, self._description.weights)
        return {"model": self._fingerprint, "cache_type": self.cache}

    def check(self, on: bool) -> None:
        """Look for NaN and infinity after every stage from now on, so that the error names the layer."""
        self._core.lowbit_engine_set_check(self._open(), int(on))

    def cancel(self) -> None:
        """End the call that another thread is in or about to make; it raises KeyboardInterrupt there."""
        self._core.lowbit_engine_cancel(self._open())

    def profile(self, on: bool) -> dict[str, int]:
        """Count from now on, or stop; returns what was counted so far: nanoseconds of one thread by part, and two counts."""
        counters = np.zeros(len(abi.PROFILE_PARTS), np.int64)
        self._core.lowbit_engine_profile(self._open(), counters.ctypes.data)
        self._core.lowbit_engine_set_profile(self._open(), int(on))
        return dict(zip(abi.PROFILE_PARTS, map(int, counters), strict=True))

    def _append(self, ids: Tokens, slot: int, every: bool) -> Floats:
        tokens = _integers(ids)
        if tokens.size == 0:
            raise RecipeError("the prompt is empty; give at least one token")
        before = self.length(slot)
        if before + tokens.size > self.context:
            raise RecipeError(
                f"{tokens.size} tokens after {before} do not fit the context of {self.context}; make the engine with a larger one"
            )
        out = []
        if tokens.size > self.chunk:  # the first chunk's frequencies may depend on the whole length
            self._check(self._core.lowbit_engine_expect(self._open(), slot, before + tokens.size))
        try:
            for start in range(0, tokens.size, self.chunk):
                part = tokens[start : start + self.chunk]
                wanted = np.full(part.size, every, np.uint8)
                wanted[-1] = every or start + part.size == tokens.size
                out.append(self._step(part, np.full(part.size, slot, np.int32), wanted))
        except (KeyboardInterrupt, LowbitError):
            self._return_to(slot, before)
            raise
        return np.concatenate(out)

    def _run_or_return(self, call: Callable[[], int], slot: int) -> None:
        """Make a call that advances a slot by itself; Ctrl-C leaves the slot as it was."""
        before = self.length(slot)
        try:
            self._run(call)
        except KeyboardInterrupt:
            self._return_to(slot, before)
            raise

    def _return_to(self, slot: int, length: int) -> None:
        """Forget what an interrupted call has read; where windows have moved on meanwhile, everything."""
        self.truncate(slot, length if length >= self.shortest(slot) else 0)

    def _step(self, tokens: NDArray[np.int32], slots: NDArray[np.int32], wanted: NDArray[np.uint8]) -> Floats:
        logits = np.empty((int(wanted.sum()), self.vocab_size), np.float32)

        def call() -> int:
            return int(
                self._core.lowbit_engine_step(
                    self._open(),
                    tokens.ctypes.data,
                    slots.ctypes.data,
                    wanted.ctypes.data,
                    tokens.size,
                    logits.ctypes.data,
                )
            )

        small = tokens.size <= self.slots
        begin = time.perf_counter()
        if small and self._step_seconds <= NOTICED_SECONDS:
            self._check(call())
        else:
            self._run(call)
        if small:
            self._step_seconds = time.perf_counter() - begin
        return logits

    def _run(self, call: Callable[[], int]) -> None:
        """Make a long call. Python runs signal handlers only between bytecodes of the main thread, so it runs beside that."""
        if threading.current_thread() is not threading.main_thread():
            return self._check(call())
        if self._beside is None or self._beside[0] != os.getpid():  # a fork leaves the helper behind
            self._beside = (os.getpid(), ThreadPoolExecutor(1, "lowbit-engine"))
        work = None
        try:  # from here on, since a signal may come before the work has its name
            work = self._beside[1].submit(lambda: self._check(call()))
            while not work.done():  # in short sleeps: a signal that another thread receives does not wake this one
                wait([work], LONGEST_SLEEP)
        finally:
            if work is None or not work.done():  # Ctrl-C, or whatever else a signal raises here
                self._end(self._beside[1])
        work.result()

    def _end(self, beside: ThreadPoolExecutor) -> None:
        """Cancel the call that was given to the thread beside this one, and wait until it has ended."""
        self.cancel()
        beside.submit(int).result()  # takes its turn behind the call
        self._core.lowbit_engine_resume(self._open())  # the call may have had no step left to cancel

    def _check(self, status: int) -> None:
        if status == LOWBIT_OK:
            return
        if status == abi.CANCELLED:
            raise KeyboardInterrupt
        raise (KernelError if status == abi.NOT_FINITE else RecipeError)(last_error())

    def _open(self) -> int:
        if not self._handle:
            raise KernelError("this engine was closed; make another one")
        return self._handle


def _integers(values: Tokens) -> NDArray[np.int32]:
    """Token ids as the core takes them; what does not fit 32 bits is outside any vocabulary and stays so."""
    wide = np.asarray(values, np.int64).ravel()
    return np.ascontiguousarray(np.where(np.abs(wide) < 2**31, wide, -1).astype(np.int32))
