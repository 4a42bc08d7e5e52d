"""How long, and in how much memory, does a model become low-bit, and load again? Every figure in a process of its own.

The model is "the 1.1 B" of `lowbit_assets.benchmark`: random, bf16, four shards. Seconds are wall time inside the process
after the imports, except for the two start-up figures, where starting is what is measured. Memory is the largest
resident set of the process, pages of the mapped shards included: what the limit compares with is the low-bit size plus
one shard. Files are read once before the first measurement, so that all runs find them in the page cache.

    python benchmarks/load_times.py                 the 1.1 B, three minutes on 2 cores
    python benchmarks/load_times.py --size 13m      the same in seconds, to try the script
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common

from lowbit_assets import benchmark_model

STARTS = 5
MEGABYTE = 1_000_000
ROOM = 700 * MEGABYTE
# What a user's script has imported before it loads a model, so that the seconds below are those of loading.
IMPORTS = """
import json, resource, sys, time
import torch, transformers, transformers.models.llama.modeling_llama
import lowbit, lowbit.checkpoint, lowbit.quantize
from lowbit import AutoModelForCausalLM
torch.set_num_threads(THREADS)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
start = time.perf_counter()
"""
QUANTISE = "model = AutoModelForCausalLM.from_pretrained(SOURCE, load_in_low_bit='int4', rounder=ROUNDER)\n"
LOAD = "model = AutoModelForCausalLM.load_low_bit(SAVED)\n"
MEASURE = """
seconds = time.perf_counter() - start
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
size = model.lowbit_report.bytes_after
"""
SAVE = "lowbit.save_low_bit(model, SAVED)\n"
TELL = "print(json.dumps({'seconds': seconds, 'peak': peak, 'size': size, 'imports': before}))\n"
IMPORT_ALONE = "import time; start = time.perf_counter(); import lowbit; print(time.perf_counter() - start)"


@dataclass(frozen=True)
class Figure:
    """One measured value and what it may be at most."""

    name: str
    value: float
    limit: float
    unit: str

    def row(self) -> tuple[str, str, str, str]:
        digits = 0 if self.unit == "MB" else 2
        verdict = "kept" if self.value <= self.limit else "**missed**"
        return self.name, f"{self.value:.{digits}f} {self.unit}", f"{self.limit:.{digits}f} {self.unit}", verdict


def run(code: str, **names: Any) -> str:
    """The last line that a fresh interpreter prints for some code."""
    given = "".join(f"{name} = {value!r}\n" for name, value in names.items())
    done = subprocess.run([sys.executable, "-c", given + code], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"a measurement failed:\n{done.stderr.strip()}")
    return done.stdout.strip().splitlines()[-1]


def quantise(source: Path, saved: Path, rounder: str, threads: int) -> dict[str, float]:
    code = IMPORTS + QUANTISE + MEASURE + SAVE + TELL
    names = {"SOURCE": str(source), "SAVED": str(saved), "ROUNDER": rounder, "THREADS": threads}
    found: dict[str, float] = json.loads(run(code, **names))
    return found


def load(saved: Path, threads: int) -> dict[str, float]:
    found: dict[str, float] = json.loads(run(IMPORTS + LOAD + MEASURE + TELL, SAVED=str(saved), THREADS=threads))
    return found


def import_seconds() -> float:
    """The quickest of several starts: what else the machine does can only add to it."""
    return min(float(run(IMPORT_ALONE)) for _ in range(STARTS))


def help_seconds() -> float:
    times = []
    for _ in range(STARTS):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "lowbit", "--help"], check=True, capture_output=True)
        times.append(time.perf_counter() - start)
    return min(times)


def read_once(folder: Path) -> int:
    """Bring the shards into the page cache; gives the bytes of the largest."""
    sizes = []
    for path in sorted(folder.glob("*.safetensors")):
        sizes.append(path.stat().st_size)
        with path.open("rb") as file:
            while file.read(1 << 24):
                pass
    return max(sizes)


def measure(source: Path, threads: int) -> tuple[list[Figure], dict[str, Any]]:
    shard = read_once(source)
    figures, raw = [], {}
    with tempfile.TemporaryDirectory() as folder:
        for rounder, name, limit in (("plain_rtn", "plain RTN", 20), ("rtn", "default", 90)):
            saved = Path(folder) / rounder
            raw[rounder] = found = quantise(source, saved, rounder, threads)
            room = (found["size"] + shard + ROOM) / MEGABYTE
            figures.append(Figure(f"int4 while loading, {name}", found["seconds"], limit, "s"))
            figures.append(Figure(f"peak memory of that, {name}", found["peak"] / MEGABYTE, room, "MB"))
            print(*figures[-2:], sep="\n", flush=True)
        raw["load"] = found = load(saved, threads)
        figures.append(Figure("loading the saved model", found["seconds"], 2, "s"))
    figures.append(Figure("import lowbit", import_seconds(), 0.15, "s"))
    figures.append(Figure("lowbit --help", help_seconds(), 0.4, "s"))
    return figures, raw | {"largest shard": shard}


def main() -> None:
    options: argparse.ArgumentParser = common.parser(__doc__.splitlines()[0])
    options.add_argument("--size", default="1.1b", help="a size of lowbit_assets.benchmark_model")
    options.add_argument("--threads", type=int, default=2)
    chosen = options.parse_args()
    figures, raw = measure(benchmark_model(chosen.size), chosen.threads)
    table = common.table(("figure", "measured", "limit", ""), [figure.row() for figure in figures])
    text = f"# Becoming low-bit, and loading: the {chosen.size} benchmark model\n\n{table}\n"
    data = {"machine": common.machine(commit=chosen.commit), "figures": [vars(f) for f in figures], "raw": raw}
    name = "load_times" if chosen.size == "1.1b" else f"load_times_{chosen.size}"
    common.write_results(chosen.results, name, text, data)


if __name__ == "__main__":
    main()
