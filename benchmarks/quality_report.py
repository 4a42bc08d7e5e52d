"""What the rows of quality.py say: tables by format, and which of the project's promises they keep.

Two rows are compared window by window, over the windows of both texts: the mean of the differences of KL and its standard
error, which is several times smaller than those of the rows themselves. Every line of judgement is computed here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import common
from default_format import TEXTS, WIDTHS, WINDOW
from quality_rows import FEW_BITS, FORMATS, GGUF, LLAMA, OURS, W8A8

from lowbit.cli.page import Plot, Point, Series, svg_of
from lowbit.evaluate import standard_error
from lowbit.formats import as_format
from lowbit.search import Search, worth_searching

NAME = "quality"
SLOW = ("autoround", "teq", "awq")
# An algorithm of ours, and the same of the project that made it known or keeps it alive.
PAIRS: dict[str, tuple[tuple[str, str], ...]] = {
    "plain rtn": (("auto-round", "rtn"),),
    "rtn + importance": (("auto-round", "opt-rtn"),),
    "hqq fine": (("hqq", "hqq"),),
    "hqq asym": (("hqq", "hqq"),),
    "gptq": (("llm-compressor", "gptq"), ("llm-compressor", "gptq mse")),
    "awq": (("llm-compressor", "awq"), ("auto-round", "awq")),
    "autoround": (("auto-round", "autoround"), ("auto-round", "autoround ext")),
    "smoothquant": (("llm-compressor", "smoothquant"),),
}
TIMED = {"gptq": PAIRS["gptq"][:1], "autoround": PAIRS["autoround"][:1]}
# "Clearly better": by more than so many standard errors of the difference.
CLEAR = 3.0
Row = dict[str, Any]


@dataclass(frozen=True)
class Difference:
    """KL of one row less that of another, window by window."""

    mean: float
    error: float

    @property
    def within(self) -> bool:
        """No worse, or worse by no more than one standard error."""
        return self.mean <= self.error

    @property
    def clear(self) -> bool:
        return self.mean < -CLEAR * self.error and self.mean < 0

    def __str__(self) -> str:
        return f"{self.mean:+.4f} ± {self.error:.4f}"


@dataclass(frozen=True)
class Verdict:
    """One comparison that a promise is about."""

    promise: str
    what: str
    kept: bool
    figures: str

    def cells(self) -> tuple[str, ...]:
        return self.what, self.figures, "met" if self.kept else "**missed**"


def place_of(machine: dict[str, str]) -> str:
    """The machine of a run, whatever was run on it."""
    return ", ".join(machine[key] for key in ("processor", "device") if key in machine)


def windows_of(row: Row) -> list[float]:
    return [kl for text in TEXTS for kl in row["texts"][text]["windows_kl"]]


def kl_of(row: Row) -> float:
    found = windows_of(row)
    return sum(found) / len(found)


def difference(row: Row, other: Row) -> Difference:
    found = [a - b for a, b in zip(windows_of(row), windows_of(other), strict=True)]
    return Difference(sum(found) / len(found), standard_error(found))


class Rows:
    """The rows that were measured, by program, algorithm and format."""

    def __init__(self, data: dict[str, Any]) -> None:
        self.places = [place_of(machine) for machine in data["machines"]]
        self.all = [row for row in data["rows"] if "error" not in row]
        self.failed = [row for row in data["rows"] if "error" in row]
        self.known = {(row["program"], row["algorithm"], row["scheme"]): row for row in self.all}

    def get(self, program: str, algorithm: str, scheme: str) -> Row | None:
        return self.known.get((program, algorithm, scheme))

    def of(self, scheme: str, ours: bool) -> list[Row]:
        found = [row for row in self.all if row["scheme"] == scheme and (row["program"] == OURS) == ours]
        return sorted(found, key=kl_of)

    def pairs(self, ours: str, theirs: tuple[str, str]) -> list[tuple[str, Row, Row]]:
        """The formats at which both were measured."""
        found = [(scheme, self.get(OURS, ours, scheme), self.get(*theirs, scheme)) for scheme in (*FORMATS, W8A8)]
        return [(scheme, one, other) for scheme, one, other in found if one and other]


def judge(data: dict[str, Any]) -> list[Verdict]:
    """Every comparison for which both rows are there."""
    rows = Rows(data)
    return [*own_projects(rows), *best_of_all(rows), *searched(rows), *at_equal_bits(rows), *times(rows)]


def own_projects(rows: Rows) -> list[Verdict]:
    promise = "Every algorithm of ours is no worse than its own project's, within one standard error"
    found = []
    for ours, others in PAIRS.items():
        for theirs in others:
            for scheme, one, other in rows.pairs(ours, theirs):
                apart = difference(one, other)
                what = f"{ours} against {theirs[0]} {theirs[1]}, {scheme}"
                found.append(Verdict(promise, what, apart.within, against(one, other, apart)))
    return found


def best_of_all(rows: Rows) -> list[Verdict]:
    promise = f"At 3 and 2 bits our best is clearly better than the best peer (by more than {CLEAR:g} standard errors)"
    found = []
    for scheme in FEW_BITS:
        ours, theirs = rows.of(scheme, ours=True), rows.of(scheme, ours=False)
        # At no more bits than the peer: zero points cost some.
        offers = [row for row in ours if theirs and row["bits"] <= theirs[0]["bits"] + 1e-3]
        if offers:
            apart = difference(offers[0], theirs[0])
            what = f"{offers[0]['algorithm']} against {theirs[0]['program']} {theirs[0]['algorithm']}, {scheme}"
            found.append(Verdict(promise, what, apart.clear, against(offers[0], theirs[0], apart)))
    return found


def is_searched(scheme: str) -> bool:
    """Whether rtn searches the scales of a format without data, for the shorter rows of the reference model."""
    format = as_format(FORMATS[scheme])
    width = format.group_size if format.group_size > 0 else min(WIDTHS)
    return worth_searching(Search(), format.bits, width).steps > 0


def searched(rows: Rows) -> list[Verdict]:
    found = []
    for better, than in (
        ("rtn", "plain rtn"),
        ("rtn + importance", "plain rtn"),
        ("awq", "rtn"),
        ("awq", "rtn + importance"),
        ("teq", "rtn"),
        ("teq", "rtn + importance"),
    ):
        promise = "Searched scales are better than plain ones; AWQ and TEQ are each better than the same rounding alone"
        for scheme, one, other in rows.pairs(better, (OURS, than)):
            if better == "rtn" and not is_searched(scheme):
                continue
            apart = difference(one, other)
            found.append(
                Verdict(promise, f"{better} against {than}, {scheme}", apart.mean < 0, against(one, other, apart))
            )
    return found


def at_equal_bits(rows: Rows) -> list[Verdict]:
    promise = "At the bits of llama.cpp's files ours is better"
    found = []
    for kind in GGUF:
        theirs = rows.get(LLAMA, kind, kind)
        for one in rows.of(kind, ours=True) if theirs else []:
            assert theirs is not None
            apart = difference(one, theirs)
            what = f"{one['algorithm']} against {kind}"
            kept = apart.mean < 0 and one["bits"] <= theirs["bits"] + 1e-3
            found.append(Verdict(promise, what, kept, against(one, theirs, apart)))
    return found


def times(rows: Rows) -> list[Verdict]:
    promise = "GPTQ and AutoRound take no longer than their own projects (rows that ran alone, on one machine)"
    found = []
    for ours, others in TIMED.items():
        for theirs in others:
            for scheme, one, other in rows.pairs(ours, theirs):
                places = {rows.places[row["machine"]] for row in (one, other)}
                if one.get("alone") and other.get("alone") and len(places) == 1:
                    what = f"{ours} against {theirs[0]} {theirs[1]}, {scheme}"
                    figures = f"{one['seconds']:.1f} s against {other['seconds']:.1f} s"
                    found.append(Verdict(promise, what, one["seconds"] <= other["seconds"], figures))
    return found


def against(one: Row, other: Row, apart: Difference) -> str:
    bits = "" if abs(one["bits"] - other["bits"]) < 5e-4 else f" ({one['bits']:.3f} and {other['bits']:.3f} bits)"
    return f"{kl_of(one):.4f} against {kl_of(other):.4f}{bits}, {apart}"


def page(data: dict[str, Any]) -> str:
    """The whole of results/quality.md but the machine."""
    rows = Rows(data)
    parts = [
        "# Quality: our algorithms beside the projects that made them known\n",
        f"{introduction(data, rows)}\n",
        "## What was promised\n",
        *promises(judge(data)),
    ]
    for scheme in (*FORMATS, W8A8):
        if rows.of(scheme, True) or rows.of(scheme, False):
            name = FORMATS.get(scheme, "w8a8")
            parts.append(f"## {scheme} (`{name}`)\n\n{section(rows, scheme)}\n")
    for kind in GGUF:
        if rows.get(LLAMA, kind, kind):
            parts.append(f"## At the bits of {kind}\n\n{section(rows, kind)}\n")
    parts += missing(rows)
    parts += machines(data)
    parts += [f"- {remark}\n" for remark in data.get("remarks", ())]
    return "\n".join(parts)


def introduction(data: dict[str, Any], rows: Rows) -> str:
    original = [rows.all[0]["texts"][text]["original"]["ppl"] for text in TEXTS] if rows.all else [0.0, 0.0]
    return (
        "The reference model off its grid (SmolLM2-135M-Instruct). In every row, ours and the peers', only the linears of the "
        "blocks are rounded; embedding, head and activations stay in fp32 (but for W8A8, whose inputs are int8 by token), "
        "norms may take up a scale. Bits are those of the linears with scales and zero points.\n\n"
        f"Calibrated on {data['samples']} x {WINDOW} tokens of sqlite_train, the same for all; measured on {data['windows']} "
        f"windows of {WINDOW} tokens of each text, of which the original has a perplexity of {original[0]:.2f} and "
        f"{original[1]:.2f}. ± are standard errors over windows; comparisons are made window by window. Seconds are those of "
        "the rounding alone, ~ where other rows ran beside it on the machine: these say little. Memory is the peak of the "
        "process while it rounded, host / device. GGUF files are those of a model whose rows hold whole blocks of 256 "
        "(columns padded, and cut again).\n\n![KL by bits](quality.svg)"
    )


def promises(verdicts: Iterable[Verdict]) -> list[str]:
    by_promise: dict[str, list[Verdict]] = {}
    for verdict in verdicts:
        by_promise.setdefault(verdict.promise, []).append(verdict)
    parts = []
    for promise, found in by_promise.items():
        kept = sum(verdict.kept for verdict in found)
        head = f"### {promise}: {'met' if kept == len(found) else '**missed**'} ({kept} of {len(found)} comparisons)\n"
        parts.append(f"{head}\n{common.table(('comparison', 'figures', ''), [v.cells() for v in found])}\n")
    return parts


def section(rows: Rows, scheme: str) -> str:
    head = ("row", "bits", "KL sqlite", "KL Moby Dick", "KL both", "ppl sqlite", "ppl Moby Dick", "top 1", "s", "MB")
    found = sorted([*rows.of(scheme, True), *rows.of(scheme, False)], key=kl_of)
    return common.table(head, [cells_of(row) for row in found])


def cells_of(row: Row) -> tuple[str, ...]:
    first, second = (row["texts"][text] for text in TEXTS)
    name = f"{row['program']} {row['algorithm']}"
    return (
        f"**{name}**" if row["program"] == OURS else name,
        f"{row['bits']:.3f}",
        *(f"{text['kl']:.4f} ± {text['standard_error']:.4f}" for text in (first, second)),
        f"{kl_of(row):.4f}",
        *(f"{text['perplexity']['ppl']:.2f}" for text in (first, second)),
        f"{50 * (first['agreement'] + second['agreement']):.1f}%",
        ("" if row.get("alone") else "~") + f"{row['seconds']:.1f}" if "seconds" in row else "",
        f"{row['host_bytes'] / 1e6:.0f} / {row['device_bytes'] / 1e6:.0f}" if "host_bytes" in row else "",
    )


def missing(rows: Rows) -> list[str]:
    if not rows.failed:
        return []
    lines = [f"- {row['name']}: {' '.join(row['error'].split())[-200:]}" for row in rows.failed]
    return ["## Rows that failed\n", "\n".join(lines) + "\n"]


def machines(data: dict[str, Any]) -> list[str]:
    """Rows of other runs than the one above the page."""
    found = []
    for number, machine in enumerate(data["machines"]):
        count = sum(row["machine"] == number for row in data["rows"])
        place = machine.get("device", machine["processor"])
        if count:
            found.append(
                f"- {count} rows: {place}, commit {machine['commit']}, `{machine['command']}`, {machine['date']}"
            )
    return ["## Runs\n", "\n".join(found) + "\n"] if found else []


def plot_of(data: dict[str, Any]) -> str:
    """KL over bits, as an SVG of its own: at each format the best of ours, our rtn without data, the best of every peer."""
    rows = Rows(data)
    groups: dict[str, list[Row]] = {"lowbit, best of a format": [], "lowbit rtn": []}
    for scheme in (*FORMATS, *GGUF):
        groups["lowbit, best of a format"] += rows.of(scheme, True)[:1]
        groups["lowbit rtn"] += [row for row in [rows.get(OURS, "rtn", scheme)] if row]
        best: dict[str, Row] = {}
        for row in rows.of(scheme, False):
            best.setdefault(row["program"], row)
        for program, row in best.items():
            groups.setdefault(program if program == LLAMA else f"{program}, best of a format", []).append(row)
    series = [Series(name, points_of(found)) for name, found in groups.items() if found]
    return svg_of(
        Plot("Mean KL by bits of a weight", "bits of a weight", "mean KL, both texts", series, logarithmic=True)
    )


def points_of(rows: Sequence[Row]) -> list[Point]:
    found = sorted(rows, key=lambda row: float(row["bits"]))
    return [Point(row["bits"], kl_of(row), f"{row['name']}: {kl_of(row):.4f} at {row['bits']:.3f}") for row in found]
