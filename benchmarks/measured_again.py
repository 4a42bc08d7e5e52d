"""Rows of results/default_format.md that were measured again on a later tree: kept beside the first, compared window by window.

The whole table takes a GPU or more than an hour. A few rows on the windows of the first run say as much about its age: if
the differences are far below those between recipes, the tree still rounds as it did.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import common

AGAIN = "measured_again"


def add_run(data: dict[str, Any], machine: dict[str, str], windows: int) -> list[dict[str, Any]]:
    """A new run among the numbers of the table, in the place of an earlier one of the same commit; its rows go into the list."""
    runs = [run for run in data.get(AGAIN, ()) if run["machine"]["commit"] != machine["commit"]]
    run: dict[str, Any] = {"machine": machine, "windows": windows, "rows": []}
    data[AGAIN] = [*runs, run]
    rows: list[dict[str, Any]] = run["rows"]
    return rows


def section(data: dict[str, Any]) -> list[str]:
    """What was measured again, then and now; nothing if nothing was."""
    parts = [_run_section(run, data) for run in data.get(AGAIN, ())]
    return ["## Measured again\n\n" + "\n".join(parts)] if parts else []


def _run_section(run: dict[str, Any], data: dict[str, Any]) -> str:
    machine = run["machine"]
    kept = {row["name"]: row for row in data["rows"]}
    lines = []
    for row in run["rows"]:
        then, now = kept[row["name"]], row
        before, after = (_windows(found, run["windows"]) for found in (then, now))
        differences = [b - a for a, b in zip(before, after, strict=True)]
        lines.append(
            (
                row["name"],
                f"{then['bits']:.3f}",
                f"{now['bits']:.3f}",
                f"{_mean(before):.4f}",
                f"{_mean(after):.4f}",
                f"{_mean(differences):+.6f}",
                f"{max(map(abs, differences)):.6f}",
            )
        )
    place = machine.get("device", machine["processor"])
    extent = "the same" if run["windows"] == data["windows"] else f"the first {run['windows']} of the {data['windows']}"
    head = ("recipe", "bits then", "bits now", "KL then", "KL now", "difference", "largest of a window")
    return (
        f"On {machine['date']}, commit {machine['commit']}, {place}, torch {machine['torch']}, {extent} windows of each text "
        f"(`{machine['command']}`):\n\n{common.table(head, lines)}\n"
    )


def largest_difference(data: dict[str, Any]) -> float:
    """The largest difference between a row then and now."""
    kept = {row["name"]: row for row in data["rows"]}
    return max(
        abs(_mean(_windows(row, run["windows"])) - _mean(_windows(kept[row["name"]], run["windows"])))
        for run in data[AGAIN]
        for row in run["rows"]
    )


def _windows(row: dict[str, Any], count: int) -> list[float]:
    """The KL of the first windows of each text."""
    return [kl for found in row["texts"].values() for kl in found["windows_kl"][:count]]


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
