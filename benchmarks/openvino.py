"""Exporting to OpenVINO's form beside optimum-intel: time, memory, what the two exports run at, and how good their 4 bits are.

    python benchmarks/openvino.py                            all rows, on a quiet machine: half an hour
    python benchmarks/openvino.py --only export decode       some; their figures replace those in the table that is kept

The peer is optimum-intel in its own environment, as `make bench-peers` leaves it (`--peers`). Four questions:

    export      seconds and the most memory of a process that exports the 1.1 B to int4, groups of 128, ratio 1.0
    decode      tokens a second of both exports in openvino_genai, 64 after a prompt of 32
    prefill     a prompt of 512
    perplexity  of SmolLM2 off its grid in int4, groups of 64, ratio 1.0: theirs by activation-aware scaling with estimated scales,
                ours by GPTQ; both look at the same text, and both keep head and embedding in 8 bits

Whatever is compared runs by turns. The name of this file is that of a package, which no script beside it may import.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
from peers.runners import Worker
from peers.tasks import Task

if __name__ == "openvino":
    raise ImportError("benchmarks/openvino.py was found in the place of the package openvino: run this from elsewhere")

WORKERS = common.HERE / "peers" / "workers"
GROUPS = {"1.1b": 128, "smollm2": 64}
TASKS = {"decode": Task("decode", 32, 64), "prefill": Task("prefill", 512)}
# Windows of the text that both look at, and their tokens: as many as their estimation of scales takes of what it is given (its
# scaling takes half of them), so that more would cost both sides minutes and hardly change anything of theirs.
CALIBRATION = (64, 512)
MEASURED = (24, 512)
TEXTS = {"SQLite's manual": "sqlite_valid", "Moby Dick": "moby_dick"}
MEGABYTE = 1_000_000
SETTINGS = "settings.json"
# Our export as it is by default: the time of the comparison is in it.
VERIFIED = "ours, compared with its source"


@dataclass(frozen=True)
class Place:
    """Where everything lies, and how it is run."""

    peers: Path
    work: Path
    threads: int
    rounds: int

    @property
    def python(self) -> Path:
        return self.peers / "openvino" / "bin" / "python"

    def folder(self, name: str) -> Path:
        return self.work / name


Found = dict[str, Any]


@dataclass(frozen=True)
class Promise:
    """A line of the table: ours against theirs, and the bound of the ratio."""

    name: str
    ours: float
    theirs: float
    unit: str
    bound: float
    at_most: bool

    def row(self) -> tuple[str, ...]:
        ratio = self.ours / self.theirs
        kept = ratio <= self.bound if self.at_most else ratio >= self.bound
        bound = f"{'at most' if self.at_most else 'at least'} {self.bound:g}"
        figures = (f"{value:.4g} {self.unit}".rstrip() for value in (self.ours, self.theirs))
        return self.name, *figures, f"{ratio:.3f}", bound, "yes" if kept else "**no**"


def environment(threads: int) -> dict[str, str]:
    """What both sides run with: so many threads, and nothing to be fetched."""
    paths = [str(common.HERE.parent / "src"), os.environ.get("PYTHONPATH", "")]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
    }


# A program's peak begins with the size of the one that started it: a small one does, and says what it saw.
_STARTER = """
import resource, subprocess, sys
quiet = subprocess.DEVNULL
code = subprocess.call(sys.argv[1:], stdout=quiet, stderr=quiet)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(code)
"""


def timed(command: Sequence[object], threads: int) -> tuple[float, int]:
    """Seconds of a program, and the most bytes that it, or one that it started, held at once."""
    words = [str(word) for word in command]
    starter = [sys.executable, "-I", "-S", "-c", _STARTER, *words]
    start = time.perf_counter()
    done = subprocess.run(
        starter, env=environment(threads), cwd=common.HERE.parent, capture_output=True, text=True, check=False
    )
    seconds = time.perf_counter() - start
    if done.returncode:
        raise SystemExit(f"this ended with {done.returncode}; run it by hand to see why: {' '.join(words)}")
    return seconds, int(done.stdout) * 1024


def told(command: Sequence[object], threads: int) -> Any:
    """The JSON that a program prints last."""
    words = [str(word) for word in command]
    done = subprocess.run(
        words, env=environment(threads), cwd=common.HERE.parent, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


# --- exports ------------------------------------------------------------------------------------------------------------


def our_export(source: Path, out: Path, *more: object) -> list[object]:
    return [sys.executable, "-m", "lowbit", "export", "openvino", "--model", source, out, *more]


def their_export(place: Place, source: Path, out: Path, group: int) -> list[object]:
    program = place.peers / "openvino" / "bin" / "optimum-cli"
    format = ("--weight-format", "int4", "--sym", "--group-size", group, "--ratio", "1.0")
    return [program, "export", "openvino", "-m", source, "--task", "text-generation-with-past", *format, out]


def exports(place: Place) -> dict[str, tuple[Path, Callable[[Path], list[object]]]]:
    """The folder of each side's 1.1 B, and the command that makes it. Ours by default compares what it wrote with its source."""
    from lowbit_assets import benchmark_model

    source, group = benchmark_model("1.1b"), GROUPS["1.1b"]
    format = ("--int4", "--group-size", group, "--ratio", "1.0")
    return {
        "ours": (place.folder("ours-1.1b"), lambda out: our_export(source, out, *format, "--no-verify")),
        "theirs": (place.folder("theirs-1.1b"), lambda out: their_export(place, source, out, group)),
        VERIFIED: (place.folder("verified-1.1b"), lambda out: our_export(source, out, *format)),
    }


def measure_export(place: Place) -> Found:
    sides = exports(place)
    found: dict[str, list[tuple[float, int]]] = {side: [] for side in sides}
    read_once()
    for _ in range(place.rounds):
        for side, (out, command) in sides.items():
            shutil.rmtree(out, ignore_errors=True)
            found[side].append(timed(command(out), place.threads))
            print(f"  export, {side}: {found[side][-1][0]:.1f} s, {found[side][-1][1] / MEGABYTE:.0f} MB", flush=True)
    return {
        side: {
            "seconds": statistics.median(seconds for seconds, _ in read),
            "megabytes": max(peak for _, peak in read) / MEGABYTE,
            "bytes of the graph": size_of(sides[side][0]),
        }
        for side, read in found.items()
    }


def read_once() -> None:
    """Bring the model's shards into the page cache, so that the first export is no slower than the next."""
    from lowbit_assets import benchmark_model

    for shard in benchmark_model("1.1b").glob("*.safetensors"):
        with shard.open("rb") as file:
            while file.read(1 << 24):
                pass


def size_of(folder: Path) -> int:
    return (folder / "openvino_model.bin").stat().st_size


# --- speed --------------------------------------------------------------------------------------------------------------


def measure_speed(name: str) -> Callable[[Place], Found]:
    """Each side begins as often as the other: who is loaded first, and who is asked first in a turn."""

    def measure(place: Place) -> Found:
        folders = {}
        for side, (out, command) in exports(place).items():
            if side == VERIFIED:
                continue
            if not (out / "openvino_model.bin").is_file():
                timed(command(out), place.threads)
            folders[side] = out
        speeds: dict[str, list[float]] = {side: [] for side in folders}
        for order in (list(folders), list(reversed(folders))):
            workers = {side: worker(place, folders[side]) for side in order}
            try:
                for turn in workers.values():
                    turn.read(TASKS[name], 0)  # lays things out
                for seed in range(place.rounds):
                    for side in order if seed % 2 else reversed(order):
                        speeds[side].append(workers[side].read(TASKS[name], 1 + seed).value)
            finally:
                for turn in workers.values():
                    turn.close()
        return {side: statistics.median(values) for side, values in speeds.items()}

    return measure


def worker(place: Place, folder: Path) -> Worker:
    return Worker(place.python, WORKERS / "run_openvino.py", folder, place.threads)


# --- quality ------------------------------------------------------------------------------------------------------------


def measure_perplexity(kind: str) -> Callable[[Place], Found]:
    """`kind` is sym or asym: codes around zero, or with a zero point for each group."""

    def measure(place: Place) -> Found:
        from lowbit_assets import reference_model, text

        source, group = reference_model("off_grid"), GROUPS["smollm2"]
        work = place.folder(f"smollm2-{kind}")
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        windows, texts = windows_of(source, text)
        (work / "windows.json").write_text(json.dumps(windows))
        calibration = work / "calibration.txt"
        calibration.write_text(text("sqlite_train"))
        settings = {"bits": 4, "sym": kind == "sym", "group_size": group, "ratio": 1.0, "texts": texts}
        (work / SETTINGS).write_text(json.dumps(settings))
        seconds = {
            "theirs": timed(
                [place.python, WORKERS / "export_optimum.py", source, work / "theirs", work / SETTINGS], place.threads
            )[0],
            "ours": sum(timed(command, place.threads)[0] for command in our_best(source, work, calibration, kind)),
        }
        found: Found = {}
        for side in ("ours", "theirs"):
            reader = [place.python, WORKERS / "losses_openvino.py", work / side, work / "windows.json"]
            losses = told(reader, place.threads)
            found[side] = {"nats": losses, "bytes of the graph": size_of(work / side), "seconds": seconds[side]}
        return found

    return measure


def our_best(source: Path, work: Path, calibration: Path, kind: str) -> list[list[object]]:
    """Quantised by GPTQ, and exported with those codes."""
    group, (samples, length) = GROUPS["smollm2"], CALIBRATION
    format = f"int4_g{group}" if kind == "sym" else f"int4_asym_g{group}"
    tables = ("--head", "int8_channel", "--embedding", "int8_channel")
    looking = ("--calibration", calibration, "--samples", samples, "--length", length)
    words = ("--format", format, *tables, "--algorithm", "gptq", *looking)
    packed = work / "packed"
    return [
        [sys.executable, "-m", "lowbit", "quantize", source, packed, *words],
        our_export(packed, work / "ours", "--no-verify"),
    ]


def windows_of(source: Path, text: Callable[[str], str]) -> tuple[dict[str, list[list[int]]], list[str]]:
    """Windows of token ids to measure on, by text, and the texts of those to look at: as many tokens as ours looks at."""
    from lowbit.runtime.files import read_tokenizer
    from lowbit_assets.texts import chunks

    tokenizer = read_tokenizer(source)

    def cut(name: str, windows: int, length: int) -> list[list[int]]:
        return chunks(tokenizer.encode(text(name), special=False), length, windows)

    measured = {title: cut(name, *MEASURED) for title, name in TEXTS.items()}
    return measured, [tokenizer.decode(ids) for ids in cut("sqlite_train", *CALIBRATION)]


# --- the table ----------------------------------------------------------------------------------------------------------

ROWS: dict[str, Callable[[Place], Found]] = {
    "export": measure_export,
    "decode": measure_speed("decode"),
    "prefill": measure_speed("prefill"),
    "perplexity-sym": measure_perplexity("sym"),
    "perplexity-asym": measure_perplexity("asym"),
}


TITLES = {"seconds": "export of the 1.1 B to int4 g128", "megabytes": "most memory of that export"}


def promises(name: str, found: Found) -> list[Promise]:
    ours, theirs = found["ours"], found["theirs"]
    if name == "export":
        lines = []
        for side, remark in (("ours", ""), (VERIFIED, ", compared with its source")):
            for name, unit in (("seconds", "s"), ("megabytes", "MB")):
                title = f"{TITLES[name]}{remark}"
                lines.append(Promise(title, found[side][name], theirs[name], unit, 0.5, True))
        return lines
    if name in TASKS:
        return [Promise(f"{name} in openvino_genai, 1.1 B", ours, theirs, "tokens/s", 1.0, False)]
    kind = "symmetric" if name.endswith("-sym") else "with zero points"
    return [
        Promise(
            f"perplexity on {title}, SmolLM2 int4 g64 {kind}",
            math.exp(ours["nats"][title]),
            math.exp(theirs["nats"][title]),
            "",
            1.0,
            True,
        )
        for title in TEXTS
    ]


def main() -> None:
    parser = common.parser(__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=tuple(ROWS), default=list(ROWS), help="which rows")
    parser.add_argument(
        "--peers", type=Path, default=common.HERE.parent / ".venv-peers", help="what make bench-peers made"
    )
    parser.add_argument("--work", type=Path, default=common.SCRATCH / "openvino", help="where exports are kept")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each side of a comparison (default: 3)")
    parser.add_argument(
        "--threads", type=int, default=os.cpu_count(), help="threads of both sides (default: all cores)"
    )
    options = parser.parse_args()
    place = Place(options.peers.resolve(), options.work.resolve(), options.threads, options.rounds)
    if not place.python.exists():
        raise SystemExit(f"{place.python} is not there: make bench-peers makes it, --peers says where it is")
    kept = options.results / "openvino.json"
    rows: Found = json.loads(kept.read_text())["rows"] if kept.is_file() else {}
    for name in options.only:
        rows[name] = {"machine": common.machine(commit=options.commit)} | ROWS[name](place)
        print(name, rows[name], flush=True)
        write(options, {row: rows[row] for row in ROWS if row in rows})


def write(options: Any, rows: Found) -> None:
    """The table of all rows that were ever measured; each has its machine in the JSON."""
    lines = [promise.row() for name, found in rows.items() for promise in promises(name, found)]
    head = ("what", "ours", "optimum-intel", "ratio", "promised", "kept")
    text = "# Exporting to OpenVINO's form beside optimum-intel\n\n" + common.table(head, lines)
    commits = {found["machine"]["commit"] for found in rows.values()}
    if len(commits) > 1:
        text += f"\n\nRows are from several commits: {', '.join(sorted(commits))}; the JSON says which.\n"
    common.write_results(
        options.results, "openvino", text, {"machine": common.machine(commit=options.commit), "rows": rows}
    )


if __name__ == "__main__":
    main()
