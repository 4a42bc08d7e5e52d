"""The texts that come with lowbit, by name: pages of SQLite's manual, which are in the public domain.

    default, sqlite_train   2.5 million characters to calibrate on
    sqlite_valid            110 thousand to measure on: paragraphs of the same manual that the first has not, nor anything like them

A figure on `sqlite_valid` of a model that was calibrated on `sqlite_train` is one in its domain; on a text of another kind
the same model loses more.
"""

from __future__ import annotations

import lzma
from pathlib import Path

from lowbit.errors import RecipeError

_HOME = Path(__file__).parent
CALIBRATING, MEASURING = "default", "sqlite_valid"
NAMED = {
    CALIBRATING: _HOME / "sqlite_train.txt.xz",
    "sqlite_train": _HOME / "sqlite_train.txt.xz",
    MEASURING: _HOME / "sqlite_valid.txt.xz",
}


def named_text(name: str) -> str:
    """A text of `NAMED`."""
    packed = NAMED[name]
    if not packed.is_file():
        raise RecipeError(
            f"the text {name!r} comes with lowbit and is missing here ({packed}): install lowbit again "
            "(pip install --force-reinstall --no-deps lowbit), or name a text file of your own"
        )
    return lzma.decompress(packed.read_bytes()).decode()
