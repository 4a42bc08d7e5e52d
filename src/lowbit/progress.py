"""Progress on long work: a bar that appears only once the work has taken two seconds. The one place that imports rich.

    with progress("packing", 272) as advance:        a bar, with the time left as soon as it is known
        ...; advance("model.layers.0.mlp.up_proj")
    with progress("starting torch"):                 work that has no steps: a sign of life and the time so far

A timer draws it, not a step: where the first step takes a minute there is a bar for most of that minute. The time left is taken
from all steps so far, since a block may take minutes (rich looks back half a minute, and then knows nothing), and without those
that were `ready` at the start, since those of an earlier run take no time.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

if TYPE_CHECKING:
    from rich.progress import ProgressColumn

PATIENCE_SECONDS = 2.0
Item = TypeVar("Item")


class Advance(Protocol):
    """Told after each step; one that was `ready` already says nothing of the time that the others take. With a `part` none
    has ended: so many of those to come are done, which end together."""

    def __call__(self, what: str, ready: bool = False, part: float | None = None) -> None: ...


@contextmanager
def progress(
    label: str,
    total: int | None = None,
    show: bool | None = None,
    patience: float | None = None,
    still: bool = False,
) -> Iterator[Advance]:
    """Yields `advance(what)`, to be called after each of `total` steps. Draws on stderr, and only on a terminal unless told to.

    A `still` bar is there from the start and moves with the steps alone: work that is being timed is not disturbed.
    """
    drawing = sys.stderr.isatty() if show is None else show
    wait = PATIENCE_SECONDS if patience is None else patience
    bar = _Bar(label, total, 0 if still else wait, still) if drawing else None
    try:
        yield bar.advance if bar else _silent
    finally:
        if bar:
            bar.close()


def counted(
    items: Collection[Item], label: str, show: bool | None = None, patience: float | None = None
) -> Iterator[Item]:
    """The items one after another, with a bar that counts them."""
    with progress(label, len(items), show, patience) as advance:
        for item in items:
            yield item
            advance("")


def _silent(what: str, ready: bool = False, part: float | None = None) -> None:
    pass


class Pace:
    """How long steps take, and so how long those to come will."""

    def __init__(self, total: int | None, now: float) -> None:
        self.total, self.start, self.last = total, now, now
        self.done = self.ready = 0
        self.part = 0.0

    def work(self, part: float, now: float) -> None:
        """So much of the steps to come is done."""
        self.part, self.last = part, now

    def step(self, now: float, ready: bool = False) -> None:
        self.done, self.last = self.done + 1, now
        self.part = max(self.part - 1, 0.0)
        self.ready += ready
        if ready and self.ready == self.done:
            self.start = now

    def left(self, now: float) -> float | None:
        """Seconds until the last step, or None before any of the first."""
        made = self.done - self.ready + self.part
        if self.total is None or not made:
            return None
        each = (self.last - self.start) / made
        return max(each * (self.total - self.done - self.part) - (now - self.last), 0.0)


def clock_text(seconds: float | None) -> str:
    """Hours, minutes and seconds."""
    if seconds is None:
        return "-:--:--"
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


class _Bar:
    """A rich bar, started late so that quick work prints nothing."""

    def __init__(self, label: str, total: int | None, patience: float, still: bool = False) -> None:
        self.label, self.total, self.what = label, total, ""
        self.pace = Pace(total, time.monotonic())
        self.patience, self.still, self.lock = patience, still, threading.Lock()
        self.closed = False
        self.stop: Callable[[], None] | None = None
        self.update: Callable[[], None] | None = None
        self.timer: threading.Timer | None = None
        if patience <= 0:
            self._draw()
            return
        self.timer = threading.Timer(patience, self._draw)
        self.timer.daemon = True
        self.timer.start()

    def advance(self, what: str, ready: bool = False, part: float | None = None) -> None:
        self.what = what
        if part is None:
            self.pace.step(time.monotonic(), ready)
        else:
            self.pace.work(part, time.monotonic())
        if self.update is not None:
            self.update()

    def _draw(self) -> None:
        """Called by the timer, in its own thread, or at the start."""
        from rich.console import Console
        from rich.progress import Progress

        columns = _columns(self.total, self.pace)
        drawn = Progress(
            *columns, console=Console(stderr=True), transient=True, redirect_stdout=False, auto_refresh=not self.still
        )
        task = drawn.add_task(self.label, total=self.total, completed=self.pace.done, what=self.what)
        drawn.tasks[0].start_time = drawn.get_time() - self.patience
        with self.lock:
            if self.closed:
                return
            self.stop = drawn.stop
            self.update = lambda: drawn.update(
                task, completed=self.pace.done + self.pace.part, what=self.what, refresh=self.still
            )
            drawn.start()
            self.update()  # a step that ended meanwhile

    def close(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
        with self.lock:
            self.closed = True
            if self.stop is not None:
                self.stop()


def _columns(total: int | None, pace: Pace) -> list[ProgressColumn]:
    """What a line of progress shows."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        ProgressColumn,
        SpinnerColumn,
        TextColumn,
        TimeElapsedColumn,
    )
    from rich.text import Text

    class TimeLeftColumn(ProgressColumn):
        def render(self, task: Any) -> Text:
            return Text(clock_text(pace.left(time.monotonic())), style="progress.remaining")

    label, what = TextColumn("{task.description}"), TextColumn("{task.fields[what]}")
    if total is None:
        return [SpinnerColumn(), label, TimeElapsedColumn()]
    return [label, BarColumn(), MofNCompleteColumn(), TimeLeftColumn(), what]
