"""Parameters without meaning today: accepted, and named once with the reason, where the script passes them."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

_ROOM = str(Path(__file__).parent)
_SAID: set[str] = set()


class CompatWarning(UserWarning):
    """An old script was answered in another way than it says."""


def say_ignored(owner: str, parameter: str, reason: str) -> None:
    """Warn, once in a process, that `parameter` of `owner` does nothing."""
    say_once(f"{owner}: {parameter} has no effect: {reason}")


def say_once(text: str) -> None:
    """Warn, once in a process, at the line of the caller outside of this room."""
    if text in _SAID:
        return
    _SAID.add(text)
    warnings.warn(text, CompatWarning, stacklevel=_frames_of_ours())


def _frames_of_ours() -> int:
    """How many frames up the first one outside of this room is, as `warnings.warn` counts them in `say_once`."""
    level = 1
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_ROOM):
        frame, level = frame.f_back, level + 1
    return level
