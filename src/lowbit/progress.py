"""Progress on long work: a bar that appears only once the work has taken two seconds. The one place that imports rich.

    with progress("packing", 272) as advance:        a bar, with the time left as soon as it is known
        ...; advance("model.layers.0.mlp.up_proj")
    with progress("starting torch"):                 work that has no steps: a sign of life and the time so far

A timer draws it, not a step: where the first step takes a minute there is a bar for most of that minute.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import TypeVar

PATIENCE_SECONDS = 2.0
Advance = Callable[[str], None]
Item = TypeVar("Item")


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


def _silent(what: str) -> None:
    pass


class _Bar:
    """A rich bar, started late so that quick work prints nothing."""

    def __init__(self, label: str, total: int | None, patience: float, still: bool = False) -> None:
        self.label, self.total, self.done, self.what = label, total, 0, ""
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

    def advance(self, what: str) -> None:
        self.done, self.what = self.done + 1, what
        if self.update is not None:
            self.update()

    def _draw(self) -> None:
        """Called by the timer, in its own thread, or at the start."""
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            ProgressColumn,
            SpinnerColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        label, what = TextColumn("{task.description}"), TextColumn("{task.fields[what]}")
        columns: tuple[ProgressColumn, ...] = (label, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), what)
        if self.total is None:
            columns = (SpinnerColumn(), label, TimeElapsedColumn())
        drawn = Progress(
            *columns, console=Console(stderr=True), transient=True, redirect_stdout=False, auto_refresh=not self.still
        )
        task = drawn.add_task(self.label, total=self.total, completed=self.done, what=self.what)
        drawn.tasks[0].start_time = drawn.get_time() - self.patience
        with self.lock:
            if self.closed:
                return
            self.stop = drawn.stop
            self.update = lambda: drawn.update(task, completed=self.done, what=self.what, refresh=self.still)
            drawn.start()
            self.update()  # a step that ended meanwhile

    def close(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
        with self.lock:
            self.closed = True
            if self.stop is not None:
                self.stop()
