"""Progress on long work: a bar that appears only once the work has taken two seconds. The one place that imports rich's bars."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import TypeVar

PATIENCE_SECONDS = 2.0
Advance = Callable[[str], None]
Item = TypeVar("Item")


@contextmanager
def progress(
    label: str, total: int, show: bool | None = None, clock: Callable[[], float] = time.monotonic
) -> Iterator[Advance]:
    """Yields `advance(what)`, to be called after each of `total` steps. Draws on stderr, and only on a terminal unless told to."""
    drawing = sys.stderr.isatty() if show is None else show
    bar = _Bar(label, total, clock) if drawing else None
    try:
        yield bar.advance if bar else _silent
    finally:
        if bar:
            bar.close()


def counted(
    items: Collection[Item], label: str, show: bool | None = None, clock: Callable[[], float] = time.monotonic
) -> Iterator[Item]:
    """The items one after another, with a bar that counts them."""
    with progress(label, len(items), show, clock) as advance:
        for item in items:
            yield item
            advance("")


def _silent(what: str) -> None:
    pass


class _Bar:
    """A rich bar with the time left, started late so that quick work prints nothing."""

    def __init__(self, label: str, total: int, clock: Callable[[], float]) -> None:
        self.label, self.total, self.done = label, total, 0
        self.clock, self.start = clock, clock()
        self.stop: Callable[[], None] | None = None
        self.update: Callable[[str], None] | None = None

    def advance(self, what: str) -> None:
        self.done += 1
        if self.update is None and self.clock() - self.start > PATIENCE_SECONDS:
            self._draw()
        if self.update is not None:
            self.update(what)

    def _draw(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            "{task.description}",
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[what]}"),
        )
        drawn = Progress(*columns, console=Console(stderr=True), transient=True)
        task = drawn.add_task(self.label, total=self.total, completed=self.done, what="")
        drawn.start()
        self.stop = drawn.stop
        self.update = lambda what: drawn.update(task, completed=self.done, what=what)

    def close(self) -> None:
        if self.stop is not None:
            self.stop()
