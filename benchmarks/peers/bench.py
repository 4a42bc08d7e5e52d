"""What cpu_decode.py, cpu_prefill.py and cpu_start.py share: their options, their results, one row after the other."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common

from peers.entries import Entry, Place, entries, generate_entry
from peers.report import judge, median_profile, on_tiles, page
from peers.rounds import LOOKS, Limits, Row, each_row, run_row, say
from peers.runners import Worker
from peers.tasks import Task

PROFILES = 5
DEFAULT_PEERS = Path(__file__).parents[2] / ".venv-peers"
common.LOCAL_OPTIONS += ("--peers", "--ik-bin", "--llama-bin", "--without-amx")


def options(description: str) -> argparse.ArgumentParser:
    made = common.parser(description)
    made.add_argument("--peers", type=Path, default=DEFAULT_PEERS, help="the folder that make bench-peers filled")
    made.add_argument("--ik-bin", type=Path, help="the folder with ik_llama.cpp's programs")
    made.add_argument("--llama-bin", type=Path, help="the folder with llama.cpp's programs")
    made.add_argument("--without-amx", type=Path, help="a library to preload that keeps tiles from the peers")
    made.add_argument("--isa", default="", help="the instruction set that ours uses, if not the machine's best")
    made.add_argument("--threads", type=int, default=2)
    made.add_argument("--cores", default="", help="the cores to stay on, as taskset takes them")
    made.add_argument("--rounds", type=int, default=5)
    made.add_argument("--looks", type=int, default=LOOKS, help="rounds in which the flags of peers are compared")
    made.add_argument("--models", nargs="+", default=[], help="only these models: smollm2, random-1.1b")
    made.add_argument("--programs", nargs="+", default=[], help="only these programs besides ours")
    made.add_argument("--only", nargs="+", default=[], metavar="ROW", help="measure only these rows, again if need be")
    made.add_argument("--short", action="store_true", help="fewer new tokens: to try the script")
    made.add_argument(
        "--profile", action="store_true", help="where our engine's time goes in every row, not only in those that miss"
    )
    made.add_argument("--report", action="store_true", help="write the page again from what was measured")
    return made


def run(name: str, title: str, rows: Sequence[Row], chosen: argparse.Namespace) -> None:
    """Measure the rows that are missing and write the page."""
    path: Path = chosen.results / f"{name}.json"
    data: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"rows": {}}
    rows = [row for row in rows if not chosen.models or row.model in chosen.models or row.name in data["rows"]]
    if not chosen.report:
        data |= {"machine": common.machine(commit=chosen.commit), "threads": chosen.threads}
        data["without_amx"] = chosen.without_amx is not None
        data["isa"] = chosen.isa
        place = Place(
            chosen.peers.absolute(),
            chosen.threads,
            chosen.ik_bin,
            chosen.llama_bin,
            chosen.without_amx,
            chosen.cores,
            chosen.isa,
        )
        limits = Limits(chosen.threads, place.prefix)

        def keep() -> None:
            chosen.results.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(common.rounded(data)) + "\n")

        def measure_and_explain(row: Row) -> dict[str, Any]:
            found = measure(row, place, limits, chosen)
            judged = judge(row, data["rows"] | {row.name: found}, read_quality(chosen.results), on_tiles(data))
            if (chosen.profile or judged.missed or row.amx_products) and judged.ours:
                found["profile"] = profile(row, place, judged.ours["name"])
            return found

        each_row(rows, chosen.only, data["rows"], measure_and_explain, keep)
    common.write_results(chosen.results, name, page(title, rows, data, read_quality(chosen.results)), data)


def measure(row: Row, place: Place, limits: Limits, chosen: argparse.Namespace) -> dict[str, Any]:
    row = shortened(row) if chosen.short else row
    return run_row(row, contenders(row, place, chosen.programs), limits, chosen.rounds, chosen.looks)


def shortened(row: Row) -> Row:
    from dataclasses import replace

    return replace(row, task=row.task.shorter(4))


def contenders(row: Row, place: Place, programs: Sequence[str]) -> list[Entry]:
    """Who takes part in a row, of those that are there."""
    listed = entries(place, row.model, row.width)
    if row.against == "lowbit":
        listed = [next(e for e in listed if e.file == "int4"), generate_entry(place, row.model)]
    if row.only:
        listed = [e for e in listed if e.ours or e.program in row.only]
    if row.files:
        listed = [e for e in listed if e.file in row.files]
    if programs:
        listed = [e for e in listed if e.ours or e.program in programs]
    for entry in listed:
        if not entry.there:
            say(f"  {entry.name}: not there ({entry.path})")
    return [e for e in listed if e.there]


def profile(row: Row, place: Place, name: str) -> dict[str, Any]:
    """Where it goes with one recipe of ours: the stages of a process, or the parts of the engine's steps."""
    entry = next((e for e in entries(place, row.model, row.width) if e.name == name), None)
    if entry is None or row.task.kind == "repack":  # model.generate adds the ratio itself; no engine runs in a repack
        return {}
    runner, task = entry.make(entry.to_try(row.task)[0], row.task), row.task
    assert isinstance(runner, Worker)
    if task.kind in ("start", "memory"):
        return {"of": name, "stages": runner.stages(task.context)}
    try:
        asked = Task("profile", task.context, task.new, task.sequences)
        counted = median_profile([runner.ask(asked, seed)["value"] for seed in range(PROFILES)])
    finally:
        runner.close()
    return {"of": name, **counted}


def read_quality(results: Path) -> dict[str, float]:
    """KL by file, as peers_quality.py left it."""
    path = results / "peers_quality.json"
    if not path.exists():
        path = common.RESULTS / "peers_quality.json"
    if not path.exists():
        return {}
    return {row["name"]: row["kl"] for row in json.loads(path.read_text())["rows"]}
