"""Rows of results/default_format.md that were measured again on a later tree: kept beside the first, compared window by window.

The whole table takes a GPU or more than an hour. A few rows on the windows of the first run say as much about its age: if
the differences are far below those between recipes, the tree still rounds as it did.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import common

AGAIN = "measured_again"


def begin_run(data: dict[str, Any], machine: dict[str, str], windows: int) -> list[dict[str, Any]]:
    """A new run among the numbers of the table, in the place of an earlier one; its rows go into the list."""
    rows: list[dict[str, Any]] = []
    data[AGAIN] = {"machine": machine, "windows": windows, "rows": rows}
    return rows


def section(data: dict[str, Any]) -> list[str]:
    """What was measured again, then and now; nothing if nothing was."""
    if AGAIN not in data:
        return []
    run = data[AGAIN]
    machine = run["machine"]
    lines = []
    for then, now, differences in _pairs(data):
        lines.append(
            (
                now["name"],
                f"{then['bits']:.3f}",
                f"{now['bits']:.3f}",
                f"{_mean(_windows(then, run['windows'])):.4f}",
                f"{_mean(_windows(now, run['windows'])):.4f}",
                f"{_mean(differences):+.6f}",
                f"{max(map(abs, differences)):.6f}",
            )
        )
    place = machine.get("device", machine["processor"])
    extent = "the same" if run["windows"] == data["windows"] else f"the first {run['windows']} of the {data['windows']}"
    head = ("recipe", "bits then", "bits now", "KL then", "KL now", "difference", "largest of a window")
    return [
        f"## Measured again\n\nOn {machine['date']}, commit {machine['commit']}, {place}, torch {machine['torch']}, {extent} "
        f"windows of each text (`{machine['command']}`):\n\n{common.table(head, lines)}\n"
    ]


def verdict(data: dict[str, Any], decides: Sequence[str]) -> str:
    """What the rows that were measured again say about the age of all."""
    if AGAIN not in data:
        return "The rows were not measured again."
    run = data[AGAIN]
    commit = common.bare_commit(run["machine"])
    largest = max(abs(_mean(differences)) for _, _, differences in _pairs(data))
    later = common.changed_since(commit, decides)
    since = f", since which these have changed: {common.code_names(later)}" if later else ""
    return (
        f"{len(run['rows'])} of the {len(data['rows'])} rows were measured again at {commit}{since}; they differ by "
        f"{largest:.6f} at most (see below). The others were not."
    )


def _pairs(data: dict[str, Any]) -> Iterator[tuple[dict[str, Any], dict[str, Any], list[float]]]:
    """A row then, the row now, and their differences window by window."""
    kept, run = {row["name"]: row for row in data["rows"]}, data[AGAIN]
    for row in run["rows"]:
        then = kept[row["name"]]
        both = zip(_windows(then, run["windows"]), _windows(row, run["windows"]), strict=True)
        yield then, row, [now - before for before, now in both]


def _windows(row: dict[str, Any], count: int) -> list[float]:
    """The KL of the first windows of each text."""
    return [kl for found in row["texts"].values() for kl in found["windows_kl"][:count]]


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
