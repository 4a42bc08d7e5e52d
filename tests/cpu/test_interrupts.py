"""An engine that is interrupted: by Ctrl-C and other signals, or by another thread. None of it depends on how fast anything is."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import pytest

from lowbit.errors import LowbitError
from lowbit.models.families import spec_from_config
from lowbit.runtime.engine import LONGEST_CHUNK, Engine
from lowbit.runtime.weights import engine_weights
from unit.family_cases import CASES, arrays, tiny_model

E = TypeVar("E", bound=Engine)


def engine_of(context: int = 256, kind: type[E] = Engine) -> E:  # type: ignore[assignment]
    model_type, fields = CASES["llama"]
    model = tiny_model(model_type, fields)
    spec = spec_from_config(model.config.to_dict())
    return kind(spec, engine_weights(spec, arrays(model)), context, cache="fp32", compute="fp32")


def main_thread() -> int:
    number = threading.main_thread().ident
    assert number is not None
    return number


class Pressed(Engine):
    """Ctrl-C is pressed when the third chunk of a prompt begins to be read, however busy the machine."""

    chunks = 0

    def _run(self, call: Callable[[], int]) -> None:
        def read() -> int:
            self.chunks += 1
            if self.chunks == 3:
                signal.pthread_kill(main_thread(), signal.SIGINT)
            return call()

        super()._run(read)


def test_control_c_in_a_long_prompt_leaves_chunks_unread() -> None:
    chunks = 24
    with engine_of(context=chunks * LONGEST_CHUNK, kind=Pressed) as engine:
        engine.profile(True)
        with pytest.raises(KeyboardInterrupt):
            engine.prefill([7] * (chunks * engine.chunk))
        assert engine.chunks == 3 and 2 <= engine.profile(False)["steps"] <= 3
        assert engine.length() == 0
        assert np.isfinite(engine.prefill([7, 8, 9])).all()


def test_a_cancel_from_another_thread_ends_a_call_within_a_step() -> None:
    with engine_of(context=4096) as engine:
        engine.prefill([7] * 3000)
        expected = engine.continue_greedy(1, 3)
        engine.truncate(0, 3000)
        engine.profile(True)
        seen: list[BaseException] = []
        begun: list[int] = []

        def work() -> None:
            try:
                while True:  # a call may end before a busy machine lets the other thread cancel it
                    begun.append(1000)
                    engine.continue_greedy(1, 1000)
                    engine.truncate(0, 3000)
            except KeyboardInterrupt as interrupt:
                seen.append(interrupt)

        worker = threading.Thread(target=work)
        worker.start()
        engine.cancel()  # once, whether the call has begun or not
        worker.join()
        assert len(seen) == 1 and engine.length() == 3000
        assert engine.profile(False)["steps"] < sum(begun)
        assert engine.continue_greedy(1, 3) == expected


class Telling(ThreadPoolExecutor):
    """The thread that long calls run on, which tells that it was given one."""

    def __init__(self) -> None:
        super().__init__(1)
        self.given = threading.Event()

    def submit(self, *call: Any) -> Future[Any]:  # type: ignore[override]
        work = super().submit(*call)
        self.given.set()
        return work


class Queued(Engine):
    """A signal comes to the main thread when it has given a call away, which waits until the main thread has cancelled it."""

    def press(self, number: signal.Signals) -> None:
        beside, self.cancelled = Telling(), threading.Event()
        self._beside = (os.getpid(), beside)

        def until_cancelled() -> None:
            assert beside.given.wait(60)
            signal.pthread_kill(main_thread(), number)
            assert self.cancelled.wait(60)

        self.held = ThreadPoolExecutor.submit(beside, until_cancelled)

    def cancel(self) -> None:
        super().cancel()
        self.cancelled.set()


class Ended(BaseException):
    """What the command line makes of SIGTERM."""


def end(*_: object) -> None:
    raise Ended


@pytest.mark.parametrize(
    ("number", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Ended)], ids=["ctrl-c", "term"]
)
@pytest.mark.parametrize("moment", ["before the first step", "behind the last step"])
def test_a_signal_beside_every_step(moment: str, number: signal.Signals, raised: type[BaseException]) -> None:
    """It comes before the call has reached the core, which ends its first step, or when it is done, which ends nothing later."""
    before = signal.signal(signal.SIGTERM, end)
    try:
        with engine_of(context=1024, kind=Queued) as engine:
            expected = engine.generate([7, 8, 9], 3)
            engine.reset()
            engine.prefill([7, 8, 9])
            engine.profile(True)
            engine.press(number)
            with pytest.raises(raised):
                if moment == "before the first step":
                    engine.continue_greedy(1, 1000)
                else:
                    engine._run(lambda: 0)
            assert engine.held.done() and engine.held.exception() is None
            assert engine.profile(False)["steps"] <= 1
            assert engine.length() == 3
            engine.reset()
            assert engine.generate([7, 8, 9], 3) == expected
    finally:
        signal.signal(signal.SIGTERM, before)


def test_cancelling_leaves_the_slot_as_it_was() -> None:
    with engine_of(context=1 << 15) as engine:
        engine.prefill(range(5, 35))
        seen: list[BaseException] = []

        def generate() -> None:
            try:
                engine.continue_greedy(1, 30000)
            except KeyboardInterrupt as interrupt:
                seen.append(interrupt)

        worker = threading.Thread(target=generate)
        worker.start()
        while engine.length() == 30 and worker.is_alive():
            time.sleep(0.001)
        with pytest.raises(LowbitError, match="at work in another thread"):
            engine.decode(1)
        engine.cancel()
        worker.join()
        assert len(seen) == 1
        assert engine.length() == 30
        assert np.isfinite(engine.decode(1)).all()


def test_control_c_ends_a_call_and_the_engine_goes_on() -> None:
    """In the middle of it, and received by another thread, which does not wake the main thread."""
    with engine_of(context=1 << 15) as engine:
        before = engine.prefill(range(5, 35))
        engine.reset()

        def press() -> None:
            while engine.length() == 0:
                time.sleep(0.001)
            signal.raise_signal(signal.SIGINT)

        presser = threading.Thread(target=press)
        with pytest.raises(KeyboardInterrupt):
            presser.start()
            engine.continue_greedy(1, 32000)
        presser.join()
        assert engine.length() == 0
        assert np.abs(engine.prefill(range(5, 35)) - before).max() < 1e-5


def test_a_slow_token_runs_beside_the_main_thread_from_the_first_one_on() -> None:
    """Where a step may be long, Ctrl-C has to find a main thread that waits in Python; only steps known to be short stay there."""
    with engine_of() as engine:
        engine.decode(5)
        assert engine._beside is not None
