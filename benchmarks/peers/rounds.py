"""A B A B: every contender of a row measured in turn, round after round, so that a slow minute of the host hits all alike.

Before each measurement the machine's limits are read (a third of a second): bandwidth and integer peak belong beside the
figure, because both move by tens of percent on a shared host. A reading during which other processes took more than
`NOISE` of a core is kept, marked, and left out of the median as long as at least three quiet ones remain.

The best flags of each peer are looked for first, in short interleaved rounds of all its variants; then the rounds that count
run with those alone. What was found is kept row by row in the results' JSON: a run that is cut short goes on with the row
it was in.
"""

from __future__ import annotations

import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peers.entries import Entry, Variant, words_of
from peers.runners import PeerError, Reading, Runner, Worker
from peers.tasks import Task

NOISE = 0.08
FEWEST_QUIET = 3
LOOKS = 2  # rounds in which variants are compared
# Processes of their own each time, calls that must not end too soon, and what touches its memory by itself.
UNWARMED = ("start", "memory", "interrupt", "repack")
# Seeds of no round: a prompt that was read before comes out of a cache (OpenVINO's read 512 tokens three times too fast so).
FIRST_LOOK, WARM = 1000, 2000
OURS = ("lowbit",)  # in Row.only: what no peer is asked for
LIMITS = Path(__file__).parents[1] / "limits.cpp"


@dataclass(frozen=True)
class Row:
    """A line of the goals: a task on a model, who takes part, and what must be reached."""

    name: str
    model: str
    width: int
    task: Task
    ratio: float | None = None  # ours against the best peer, at least (of seconds and megabytes: at most)
    bandwidth: float | None = None  # share of the bandwidth, at least
    peak: float | None = None  # share of the integer peak, at least
    amx_ratio: float | None = None  # the ratio on a processor with tiles
    amx_products: float | None = None  # there: share of the tiles' peak that products have while they run, at least
    only: tuple[str, ...] = ()  # programs that take part besides ours; empty: all
    most: float | None = None  # the value of ours, at most
    least: float | None = None  # the value of ours, at least
    against: str = ""  # the program, or the program and its file, that the ratio is taken against; empty: the best
    files: tuple[str, ...] = ()  # only files whose name begins so; empty: all
    times: tuple[float, str] | None = None  # at least so many times our figure in another row


class Limits:
    """Reads bandwidth and integer peaks with a small program compiled on the spot."""

    def __init__(self, threads: int, prefix: Sequence[str] = ()) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="lowbit-limits-")
        program = Path(self.folder.name) / "limits"
        flags = ["-O3", "-std=c++17", "-march=native", "-pthread"]
        subprocess.run(["g++", *flags, str(LIMITS), "-o", str(program)], check=True, capture_output=True)
        self.command = [*prefix, str(program), str(threads)]

    def read(self) -> dict[str, float]:
        done = subprocess.run(self.command, capture_output=True, text=True, check=True)
        bandwidth, vector, tile = map(float, done.stdout.split())
        return {"bandwidth": bandwidth, "vector_peak": vector, "tile_peak": tile}


@dataclass
class Contender:
    """An entry in a row: the variant chosen, and what was read."""

    entry: Entry
    chosen: Variant = ()
    tried: list[dict[str, Any]] | None = None
    runner: Runner | None = None

    def open(self, task: Task) -> Runner:
        if self.runner is None:
            self.runner = self.entry.make(self.chosen, task)
        return self.runner

    def warm(self, task: Task) -> None:
        """A worker's first call compiles and allocates; a program warms up by itself each time."""
        runner = self.open(task)
        if isinstance(runner, Worker) and task.kind not in UNWARMED:
            short = 32 if task.kind != "prefill" else min(task.context, 512)
            runner.read(Task(task.kind, short, min(task.new, 8), task.sequences), WARM)

    def close(self) -> None:
        if self.runner is not None:
            self.runner.close()
            self.runner = None


def run_row(row: Row, entries: Sequence[Entry], limits: Limits, rounds: int, looks: int = LOOKS) -> dict[str, Any]:
    """Measure one row; gives what the report needs, as plain values."""
    contenders, failed = [], {}
    known: dict[str, Variant] = {}  # by program: another file of the same program is run as its first
    for entry in entries:
        contender = Contender(entry, known.get(entry.program, ()))
        try:
            if entry.program not in known:
                choose_variant(contender, row.task, looks)
                known[entry.program] = contender.chosen
            contender.warm(row.task)
        except (PeerError, OSError) as error:
            failed[entry.name] = str(error)
            say(f"  {entry.name}: left out: {error}")
            contender.close()
            continue
        contenders.append(contender)
    readings: dict[str, list[dict[str, float]]] = {c.entry.name: [] for c in contenders}
    try:
        for number in range(rounds):
            for contender in in_another_order([c for c in contenders if c.entry.name not in failed], number):
                try:
                    found = read_once(contender.open(row.task), row.task, number, limits)
                except (PeerError, OSError) as error:
                    failed[contender.entry.name] = f"round {number + 1}: {error}"
                    say(f"  {contender.entry.name}: {failed[contender.entry.name]}")
                    continue
                readings[contender.entry.name].append(found)
            say(f"  round {number + 1}: " + ", ".join(f"{n} {r[-1]['value']:.4g}" for n, r in readings.items() if r))
    finally:
        for contender in contenders:
            contender.close()
    lines = [line_of(c, readings[c.entry.name], row) for c in contenders if readings[c.entry.name]]
    return {"row": row.name, "model": row.model, "task": row.task.to_dict(), "lines": lines, "failed": failed}


def in_another_order(contenders: Sequence[Contender], number: int) -> list[Contender]:
    """The order of a round. Whoever comes behind a process that left gigabytes pays for their pages: half a second of a start."""
    return random.Random(number).sample(contenders, len(contenders))


def choose_variant(contender: Contender, task: Task, looks: int) -> None:
    """Find the best flags of one entry for a task, its variants interleaved."""
    variants = contender.entry.to_try(task)
    contender.chosen = variants[0]
    if len(variants) == 1 or looks < 1:
        return
    runners = {v: contender.entry.make(v, task) for v in variants}
    found: dict[Variant, list[float]] = {v: [] for v in variants}
    try:
        for number in range(looks):
            for one, runner in runners.items():
                found[one].append(runner.read(task.shorter(2), FIRST_LOOK + number).value)
    finally:
        for runner in runners.values():
            runner.close()
    best = (min if task.less_is_better else max)(variants, key=lambda v: statistics.median(found[v]))
    contender.chosen = best
    contender.tried = [{"flags": words_of(v), "values": found[v]} for v in variants]
    say(
        f"  {contender.entry.name}: {words_of(best)} of "
        + str({words_of(v): round(max(r), 3) for v, r in found.items()})
    )


def read_once(runner: Runner, task: Task, seed: int, limits: Limits) -> dict[str, float]:
    beside = limits.read()
    found: Reading = runner.read(task, seed)
    return {"value": found.value, "others": found.others, "peak_bytes": found.peak_bytes} | beside


def line_of(contender: Contender, readings: list[dict[str, float]], row: Row) -> dict[str, Any]:
    """The figures of one contender of a row."""
    quiet = [r for r in readings if r["others"] <= NOISE]
    counted = quiet if len(quiet) >= min(FEWEST_QUIET, len(readings)) else readings
    values = [r["value"] for r in counted]
    entry = contender.entry
    return {
        "name": entry.name,
        "program": entry.program,
        "ours": entry.ours,
        "flags": words_of(contender.chosen),
        "tried": contender.tried or [],
        "bits": entry.bits,
        "megabytes": entry.megabytes,
        "quality": entry.quality,
        "unit": row.task.unit,
        "median": statistics.median(values),
        "low": min(values),
        "high": max(values),
        "bandwidth": statistics.median(r["bandwidth"] for r in counted),
        "vector_peak": statistics.median(r["vector_peak"] for r in counted),
        "tile_peak": statistics.median(r["tile_peak"] for r in counted),
        "shares": {
            "bandwidth": statistics.median(r["value"] * entry.megabytes / 1000 / r["bandwidth"] for r in counted),
        },
        "others": max(r["others"] for r in counted),
        "quiet": len(quiet),
        "rounds": len(readings),
        "readings": readings,
    }


def say(text: str) -> None:
    print(time.strftime("%H:%M:%S"), text, file=sys.stderr, flush=True)


def each_row(
    rows: Sequence[Row],
    wanted: Sequence[str],
    done: dict[str, Any],
    measure: Callable[[Row], dict[str, Any]],
    keep: Callable[[], None],
) -> None:
    """Measure the rows that are wanted and not yet done, keeping each as soon as it is finished."""
    for row in rows:
        if wanted and row.name not in wanted:
            continue
        if row.name in done and not wanted:
            say(f"{row.name}: kept from an earlier run")
            continue
        say(row.name)
        done[row.name] = measure(row)
        keep()
