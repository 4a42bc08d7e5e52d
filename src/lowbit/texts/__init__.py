"""Texts by name, to calibrate and to measure on.

    default, sqlite_train   SQLite's manual, 2.5 million characters: comes with lowbit
    sqlite_valid            110 thousand: paragraphs of the same manual that the first has not, nor anything like them
    moby_dick               the novel, 1.2 million: comes with lowbit, and is far from any manual
    chatterbot, chitchat, postgresql, state_of_the_union   read from the packages that carry them (`packages`)

A figure on `sqlite_valid` of a model that was calibrated on `sqlite_train` is one in its domain; on a text of another kind
the same model loses more. The first two are in the public domain, the third is under CC0.
"""

from __future__ import annotations

import lzma
from pathlib import Path

from lowbit.errors import RecipeError
from lowbit.texts.packages import PACKAGED, packaged_text

_HOME = Path(__file__).parent
CALIBRATING, MEASURING = "default", "sqlite_valid"
NAMED = {
    CALIBRATING: _HOME / "sqlite_train.txt.xz",
    "sqlite_train": _HOME / "sqlite_train.txt.xz",
    MEASURING: _HOME / "sqlite_valid.txt.xz",
    "moby_dick": _HOME / "moby_dick.txt.xz",
}
TEXT_NAMES = (*NAMED, *PACKAGED)


def named_text(name: str) -> str:
    """A text of `TEXT_NAMES`."""
    if name in PACKAGED:
        return packaged_text(name)
    packed = NAMED[name]
    if not packed.is_file():
        raise RecipeError(
            f"the text {name!r} comes with lowbit and is missing here ({packed}): install lowbit again "
            "(pip install --force-reinstall --no-deps lowbit), or name a text file of your own"
        )
    return lzma.decompress(packed.read_bytes()).decode()
