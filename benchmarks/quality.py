"""How good is each algorithm of ours, beside the project that made it known, on the same tokens?

Every row rounds the linears of the blocks of the reference model off its grid (see `lowbit_assets.reference`), by one
algorithm at one format, calibrated on 128 windows of 512 tokens of sqlite_train; norms may take a scale up, embedding and
head stay as they are in every row. What the weights would be read back as is put into one model, whose perplexity and
mean KL divergence from the original are measured on the windows of `default_format.py`. Rounding runs in a worker
(`peers/workers/round_*.py`), a process of the project's own environment: its wall time and peak memory stand beside.

Rows that are there already are kept, so that a run that is cut short goes on; `quality_report.py` judges by them.

    python benchmarks/quality.py --peers DIR --device cuda             all rows, one at a time: what times are compared by
    python benchmarks/quality.py --device cuda --jobs 8 --only W2      rows whose name has one of these words, eight at once
    python benchmarks/quality.py --again                               the page once more, from the numbers
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import common
import torch
from default_format import TEXTS, WINDOWS, Bench
from peers.bench import DEFAULT_PEERS
from peers.rounders import Rounder
from peers.runners import PeerError
from quality_report import NAME, SLOW, page, plot_of
from quality_rows import GGUF, LLAMA, OURS, Row, all_rows, allocated, gguf_file, stored_bits, worker_of
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from lowbit.calibration import calibration_from
from lowbit.evaluate import divergence
from lowbit.interop.gguf import open_gguf
from lowbit.kernels.reference import round_activations
from lowbit.options import SAMPLES
from lowbit_assets import reference_model

Weights = dict[str, torch.Tensor]


class Measure:
    """The model that takes the weights of every row, and its distance from the original."""

    def __init__(self, device: str, windows: int) -> None:
        self.bench = Bench(reference_model("plain"), device, windows)
        self.start = {name: p.detach().clone() for name, p in self.bench.model.named_parameters()}
        self.linears = [path for path in self.bench.dense if ".layers." in path]
        self.shapes = [tuple(self.bench.dense[path].shape) for path in self.linears]
        self.lock = threading.Lock()

    def measure(self, weights: Weights, activations: bool) -> dict[str, Any]:
        """Perplexity and KL with these weights of the blocks, on every text."""
        unknown = sorted(set(weights) - set(self.start))
        if unknown:
            raise PeerError(f"a weight of another name: {unknown[0]}")
        with self.lock, torch.inference_mode(), self.rounding_inputs(activations):
            for name, original in self.start.items():
                self.bench.model.get_parameter(name).copy_(weights.get(name, original))
            same = [path for path in self.linears if torch.equal(self.now(path), self.bench.dense[path])]
            if same:
                raise PeerError(f"{len(same)} linears were not rounded, the first {same[0]}")
            found = {
                text: divergence(self.bench.model, self.bench.original, ids) for text, ids in self.bench.ids.items()
            }
        return {text: asdict(row) for text, row in found.items()}

    def now(self, path: str) -> torch.Tensor:
        weight: torch.Tensor = self.bench.model.get_submodule(path).weight
        return weight

    @contextmanager
    def rounding_inputs(self, wanted: bool) -> Iterator[None]:
        """Inside, linears of the blocks get inputs as int8 holds them, one scale for each token."""

        def rounding(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            return (round_activations(args[0]), *args[1:])

        paths = self.linears if wanted else []
        hooks = [self.bench.model.get_submodule(path).register_forward_pre_hook(rounding) for path in paths]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


class Run:
    """What is measured already, and how the rest is."""

    def __init__(self, chosen: argparse.Namespace) -> None:
        self.chosen, self.numbers = chosen, chosen.results / f"{NAME}.json"
        asked = {"windows": chosen.windows, "samples": chosen.samples}
        self.data: dict[str, Any] = {"machine": {}, **asked, "machines": [], "rows": []}
        if self.numbers.exists():
            self.data = json.loads(self.numbers.read_text())
        self.lock = threading.Lock()
        self.local = threading.local()
        self.rounders: list[Rounder] = []

    @property
    def rows(self) -> dict[str, dict[str, Any]]:
        return {row["name"]: row for row in self.data["rows"] if "error" not in row}

    def begin(self) -> None:
        machine = common.machine(self.chosen.device, self.chosen.commit)
        for name in ("windows", "samples"):
            if self.data[name] != getattr(self.chosen, name):
                raise SystemExit(f"{self.numbers} has rows of --{name} {self.data[name]}: ask for as many")
        self.data["machines"].append(machine)
        self.data["machine"] = machine

    def keep(self, row: dict[str, Any]) -> None:
        """Add a row, or put it in the place of one of its name; the numbers are written at once."""
        with self.lock:
            row["machine"] = len(self.data["machines"]) - 1
            self.data["rows"] = [other for other in self.data["rows"] if other["name"] != row["name"]] + [row]
            self.numbers.write_text(json.dumps(common.rounded(self.data)) + "\n")

    def rounder(self, worker: str, folder: Path) -> Rounder:
        """The worker of a thread for a project: rows of one thread follow one another in it."""
        held: dict[str, Rounder] = self.local.__dict__.setdefault("held", {})
        if worker not in held:
            own = worker == OURS or self.chosen.here
            python = Path(sys.executable) if own else self.chosen.peers / worker / "bin" / "python"
            options = ("--device", self.chosen.device, "--threads", str(self.chosen.threads))
            arguments = (str(reference_model("off_grid")), str(folder / "tokens.safetensors"), *options)
            log = self.chosen.results / f"{NAME}-{worker}-{threading.get_ident()}.log"
            held[worker] = Rounder(worker, python, arguments, log, folder)
            with self.lock:
                self.rounders.append(held[worker])
        return held[worker]


def wanted_rows(run: Run) -> list[Row]:
    """Rows that are asked for and not there, in the order of the words that ask for them.

    Among them the slow ones go first, so that several at once end together.
    """
    rows = list(all_rows())
    for kind in GGUF:
        file = run.rows.get(f"{LLAMA} {kind}, {kind}")
        rows += [allocated(kind, file["bits"], algorithm) for algorithm in ("gptq", "autoround") if file]
    words, without = run.chosen.only, run.chosen.without
    rows = [row for row in rows if not words or any(word in row.name for word in words)]
    rows = [row for row in rows if not any(word in row.name for word in without)]
    rows = [row for row in rows if run.chosen.redo or row.name not in run.rows]

    def turn(row: Row) -> tuple[int, bool]:
        place = next((i for i, word in enumerate(words) if word in row.name), 0)
        return place, not any(word in row.algorithm for word in SLOW)

    return sorted(rows, key=turn)


def gguf_row(path: Path, measure: Measure) -> tuple[Weights, float]:
    """The linears of the blocks of a GGUF file, columns of padding cut off, and their bits in the file."""
    found, bits, count = {}, 0.0, 0
    for name, tensor in open_gguf(path).tensors.items():
        linear = name.removesuffix(".weight")
        if linear in measure.linears:
            values = torch.from_numpy(tensor.read("float32"))
            weight = measure.bench.dense[linear]
            found[name] = values[:, : weight.shape[1]]
            bits += tensor.raw().nbytes * 8 / values.numel() * weight.numel()
            count += weight.numel()
    return found, bits / count


def round_row(run: Run, row: Row, measure: Measure, folder: Path) -> tuple[Weights, dict[str, Any]]:
    """The weights of a row, and what rounding them took."""
    if row.program == LLAMA:
        weights, bits = gguf_row(gguf_file(run.chosen.peers, row.scheme), measure)
        return weights, {"bits": bits}
    out = folder / f"{threading.get_ident()}.safetensors"
    facts = run.rounder(worker_of(row), folder).ask(row.settings, out)
    if "bits" not in facts:
        settings = row.settings
        facts["bits"] = stored_bits(measure.shapes, settings["bits"], settings["group"], facts.pop("zero_bits"))
    weights = load_file(out)
    out.unlink()
    return weights, facts | {"alone": run.chosen.jobs == 1}


def add_row(run: Run, row: Row, measure: Measure, folder: Path) -> None:
    """Round, measure, keep. What a project cannot do is kept as its error, and the next row is tried."""
    start = time.perf_counter()
    told = {"name": row.name, "program": row.program, "algorithm": row.algorithm, "scheme": row.scheme}
    try:
        weights, facts = round_row(run, row, measure, folder)
        texts = measure.measure(weights, row.activations)
    except PeerError as error:
        print(f"{row.name:50s} failed: {error}", flush=True)
        run.keep(told | {"error": str(error)})
        return
    run.keep(told | facts | {"texts": texts})
    kl = sum(texts[text]["kl"] for text in TEXTS) / len(TEXTS)
    spent = facts.get("seconds", 0.0)
    whole = time.perf_counter() - start
    print(f"{row.name:50s} {facts['bits']:.3f} bits  KL {kl:.4f}  {spent:.1f} s of {whole:.1f}", flush=True)


def measure_all(run: Run, rows: Iterable[Row]) -> None:
    run.begin()
    measure = Measure(run.chosen.device, run.chosen.windows)
    tokenizer = AutoTokenizer.from_pretrained(reference_model("off_grid"))
    tokens = calibration_from("sqlite_train", tokenizer, run.chosen.samples).tokens
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(run.chosen.jobs) as pool:
        folder = Path(name)
        save_file({"tokens": tokens.contiguous()}, folder / "tokens.safetensors")
        for done in [pool.submit(add_row, run, row, measure, folder) for row in rows]:
            done.result()
        for rounder in run.rounders:
            rounder.close()


def main() -> None:
    options = common.parser(__doc__.splitlines()[0])
    options.add_argument("--peers", type=Path, default=DEFAULT_PEERS, help="the folder that make bench-peers filled")
    options.add_argument("--here", action="store_true", help="the projects are importable from this interpreter")
    options.add_argument("--device", default="cpu")
    options.add_argument("--threads", type=int, default=2, help="threads of a worker")
    options.add_argument("--jobs", type=int, default=1, help="rows at once: more than one, and times say nothing")
    options.add_argument("--windows", type=int, default=WINDOWS, help="windows of each text")
    options.add_argument("--samples", type=int, default=SAMPLES, help="windows of the calibration text")
    options.add_argument("--only", nargs="+", default=[], metavar="WORD", help="rows whose name has one of these")
    options.add_argument("--without", nargs="+", default=[], metavar="WORD", help="but none of these")
    options.add_argument("--redo", action="store_true", help="rows that are there already too")
    options.add_argument("--again", action="store_true", help="write the page again from the numbers")
    options.add_argument("--remark", action="append", default=[], help="a remark on the run, kept with its numbers")
    chosen = options.parse_args()
    chosen.results = chosen.results.resolve()
    chosen.results.mkdir(parents=True, exist_ok=True)
    run = Run(chosen)
    rows = [] if chosen.again else wanted_rows(run)
    if rows:
        measure_all(run, rows)
    run.data["remarks"] = [*run.data.get("remarks", ()), *chosen.remark]
    if run.data["rows"]:  # above the page stands the run that most rows are from
        (most, _), *_ = Counter(row["machine"] for row in run.data["rows"]).most_common(1)
        run.data["machine"] = run.data["machines"][most]
    common.write_results(chosen.results, NAME, page(run.data), run.data)
    (chosen.results / f"{NAME}.svg").write_text(plot_of(run.data))


if __name__ == "__main__":
    main()
