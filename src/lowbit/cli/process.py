"""The command as a process among others: its streams, the signals that end it, warnings.

    with well_behaved(): ...        whatever ends the work unwinds it first, so that nothing half-written stays behind

Ctrl-C is a KeyboardInterrupt already. SIGTERM (a scheduler, `docker stop`) and SIGHUP (the terminal was closed) would
end Python on the spot and leave temporary folders as large as a model; here they become an exception of their own,
which no part of a command takes for Ctrl-C.
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import TextIO

from lowbit.errors import one_line

_MOMENT_SECONDS = 0.02


class Ended(BaseException):
    """A signal asks this process to end."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextlib.contextmanager
def well_behaved() -> Iterator[None]:
    """Streams that can be used, signals that unwind, warnings of one line; all as it was afterwards."""
    _open_closed_streams()
    _never_fail_on_characters()
    with _ending_signals(), _no_lost_signal(), warnings.catch_warnings():
        warnings.showwarning = _show_warning
        yield


def say_stopped() -> None:
    """The last word, unless the terminal is gone."""
    with contextlib.suppress(OSError):
        print("\nlowbit: stopped", file=sys.stderr)


def forget_stdout() -> None:
    """Nobody reads stdout any more (`lowbit inspect ... | head`): let the flush at exit go nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _open_closed_streams() -> None:
    """Who started us without stdin, stdout or stderr (`<&-`, a daemon) gets an empty input, and output that goes nowhere.

    Python has None for such a stream, and the next file to be opened, a checkpoint say, would get its number.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115  open as long as we run


def _never_fail_on_characters() -> None:
    """A model may say any character, a terminal may know only a few: the others become question marks.

    What comes in may be of another encoding than the terminal's: such bytes are kept, and told when they are to be read.
    """
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


@contextlib.contextmanager
def _ending_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP raise `Ended`, unless somebody else sees to them or ignores them (nohup)."""

    def end(number: int, frame: FrameType | None) -> None:
        raise Ended(number)

    in_main = threading.current_thread() is threading.main_thread()  # elsewhere Python sets no handlers
    numbers = [n for n in (signal.SIGTERM, signal.SIGHUP) if in_main and signal.getsignal(n) is signal.SIG_DFL]
    for number in numbers:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


@contextlib.contextmanager
def _no_lost_signal() -> Iterator[None]:
    """Ctrl-C in the middle of a `__del__`, which Python reports and drops, comes again a moment later.

    Imports of transformers spend a second there. From the hook itself nothing can be raised, hence the other thread, whose clock
    starts when the hook is done: on a busy machine its own start may take longer than the moment.
    """
    before = sys.unraisablehook

    def send_again(unraisable: sys.UnraisableHookArgs) -> None:
        error = unraisable.exc_value
        if not isinstance(error, KeyboardInterrupt | Ended):
            before(unraisable)
            return
        number = error.number if isinstance(error, Ended) else signal.SIGINT
        left = threading.Event()
        threading.Thread(target=_send, args=(number, left), daemon=True).start()
        left.set()

    sys.unraisablehook = send_again
    try:
        yield
    finally:
        sys.unraisablehook = before


def _send(number: int, left: threading.Event) -> None:
    """Send a signal to this process a moment after an event."""
    left.wait()
    time.sleep(_MOMENT_SECONDS)
    os.kill(os.getpid(), number)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """A warning as one line: where in the code it was raised says nothing to the person at the keyboard."""
    print(f"lowbit: warning: {one_line(str(message))}", file=sys.stderr)
