"""What commands print: text and tables for people, JSON for scripts.

People read stdout. With `--json`, stdout carries one JSON value and nothing else, and what people would have read goes
to stderr. Tables are plain aligned columns, which `grep` and `awk` can read too; on a terminal long names are folded to
fit it.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Iterable, Sequence
from typing import Any, TextIO

_UNITS = ("B", "kB", "MB", "GB", "TB")
_GAP = "  "
# How narrow a column of names may become.
_LEGIBLE = 16


class Output:
    """Where a command writes to."""

    def __init__(self, as_json: bool = False) -> None:
        self.as_json = as_json

    @property
    def stream(self) -> TextIO:
        return sys.stderr if self.as_json else sys.stdout

    def say(self, line: str = "") -> None:
        print(line, file=self.stream, flush=True)

    def write(self, piece: str) -> None:
        """A piece of running text, shown at once."""
        self.stream.write(piece)
        self.stream.flush()

    def note(self, line: str) -> None:
        """Something beside the result: always on stderr."""
        print(line, file=sys.stderr, flush=True)

    def facts(self, rows: Iterable[tuple[str, str]]) -> None:
        """Names and values, one pair a line."""
        pairs = list(rows)
        width = max((len(name) for name, _ in pairs), default=0)
        for name, value in pairs:
            self.say(f"{name:<{width}}{_GAP}{value}")

    def table(self, headers: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[str] = ()) -> None:
        """Rows under headers; the columns named in `right` hold numbers and are aligned to the right."""
        width = shutil.get_terminal_size().columns if self.stream.isatty() else None
        self.say("\n".join(table_lines(headers, list(rows), right, width)))

    def result(self, value: Any) -> None:
        """What a script reads: printed with `--json` only."""
        if self.as_json:
            print(json.dumps(_with_null(value), indent=1, allow_nan=False), file=sys.stdout, flush=True)


def _with_null(value: Any) -> Any:
    """A value with null for each number that JSON cannot say: infinity, and what is not a number."""
    if isinstance(value, dict):
        return {name: _with_null(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_with_null(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def table_lines(
    headers: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str] = (), width: int | None = None
) -> list[str]:
    """A table as lines of aligned columns. To fit a width its widest column of names is folded, if that leaves it legible."""
    columns = [list(column) for column in zip(headers, *rows, strict=True)]
    widths = [max(map(len, column)) for column in columns]
    excess = sum(widths) + len(_GAP) * (len(widths) - 1) - (width or sys.maxsize)
    names = [index for index, header in enumerate(headers) if header not in right]
    if excess > 0 and names:
        widest = max(names, key=lambda index: widths[index])
        if widths[widest] - excess >= _LEGIBLE:
            widths[widest] -= excess

    def lines(cells: Sequence[str]) -> list[str]:
        folded = [_fold(cell, size) for cell, size in zip(cells, widths, strict=True)]
        placed = [
            [text.rjust(size) if header in right else text.ljust(size) for text in texts]
            for texts, size, header in zip(folded, widths, headers, strict=True)
        ]
        blank = [" " * size for size in widths]
        return [_GAP.join(row).rstrip() for row in _rows_of(placed, blank)]

    return [line for cells in (headers, *rows) for line in lines(cells)]


def _rows_of(columns: list[list[str]], blank: list[str]) -> list[list[str]]:
    """Folded cells, side by side as lines of a table."""
    height = max(map(len, columns), default=0)
    return [[c[i] if i < len(c) else empty for c, empty in zip(columns, blank, strict=True)] for i in range(height)]


def _fold(text: str, width: int) -> list[str]:
    """A text in pieces that are no longer than a width, cut behind a dot or a space, else behind an underscore, else anywhere."""
    pieces = []
    while len(text) > width:
        cut = max(text.rfind(".", 0, width), text.rfind(" ", 0, width)) + 1 or text.rfind("_", 0, width) + 1 or width
        pieces.append(text[:cut])
        text = text[cut:]
    return [*pieces, text]


def size_text(count: float) -> str:
    """Bytes for people: 93.1 MB."""
    for unit in _UNITS:
        if abs(count) < 1000 or unit == _UNITS[-1]:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError("unreachable: the last unit takes every size")


def count_text(count: float) -> str:
    """A number of weights for people: 134.5 M."""
    for unit in ("", " K", " M", " G"):
        if abs(count) < 1000 or unit == " G":
            return f"{count:.0f}" if not unit else f"{count:.1f}{unit}"
        count /= 1000
    raise AssertionError("unreachable: the last unit takes every number")


def count_of(count: int, thing: str) -> str:
    """So many of a thing: 1 token, 2 tokens."""
    return f"{count} {thing}{'' if count == 1 else 's'}"


def seconds_text(seconds: float) -> str:
    """A duration for people: 12.3 ms, 4.56 s."""
    return f"{seconds * 1000:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"
