"""What commands print: text and tables for people, JSON for scripts.

People read stdout. With `--json`, stdout carries one JSON value and nothing else, and what people would have read goes
to stderr. On a terminal a table is drawn by rich; into a file or a pipe it is plain aligned columns that `grep` and
`awk` can read. The one file of the command line that imports rich.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from typing import Any, TextIO

_UNITS = ("B", "kB", "MB", "GB", "TB")
_GAP = "  "


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
        cells = [list(row) for row in rows]
        if self.stream.isatty():
            _draw_table(headers, cells, right, self.stream)
        else:
            self.say("\n".join(plain_table(headers, cells, right)))

    def result(self, value: Any) -> None:
        """What a script reads: printed with `--json` only."""
        if self.as_json:
            print(json.dumps(value, indent=1), file=sys.stdout, flush=True)


def plain_table(headers: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str] = ()) -> list[str]:
    """A table as lines of aligned columns."""
    widths = [max(map(len, column)) for column in zip(headers, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        placed = (c.rjust(w) if h in right else c.ljust(w) for c, w, h in zip(cells, widths, headers, strict=True))
        return _GAP.join(placed).rstrip()

    return [line(headers), *map(line, rows)]


def _draw_table(headers: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str], stream: TextIO) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for header in headers:
        table.add_column(
            header, justify="right" if header in right else "left", no_wrap=header in right, overflow="fold"
        )
    for row in rows:
        table.add_row(*map(Text, row))
    Console(file=stream).print(table)


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


def seconds_text(seconds: float) -> str:
    """A duration for people: 12.3 ms, 4.56 s."""
    return f"{seconds * 1000:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"
