"""What do the old names cost, and what do scripts that use them gain?

    python benchmarks/old_apis.py                  all rows, on a quiet machine: a quarter of an hour
    python benchmarks/old_apis.py --only import runner

Four questions: how long `import lowbit.compat` takes, what the runner adds to a script (one that does nothing, and one that imports
torch), how much faster a model decodes after `ipex.llm.optimize(model, dtype=torch.bfloat16)` than transformers decodes it in bf16,
and how much faster one reads a prompt after the two stages of SmoothQuant (8 bits for weights and activations) than in bf16, that
of `ipex.llm.optimize` and transformers' own. Whatever is compared runs in processes by turns.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common

SCRIPT = Path(__file__).with_name("old_apis_script.py")
RUNNER = ("-m", "lowbit.compat")
STARTS = 15
IMPORT = (
    "import time; start = time.perf_counter(); import lowbit.compat; took = time.perf_counter() - start\n"
    "import sys; assert 'torch' not in sys.modules; print(took)"
)


@dataclass(frozen=True)
class Promise:
    """A row: what is measured, in which unit, and the bound that is promised for it."""

    name: str
    unit: str
    bound: float
    at_most: bool
    measure: Callable[[Any], dict[str, float]]

    def kept(self, figure: float) -> bool:
        return figure <= self.bound if self.at_most else figure >= self.bound


def python(*arguments: str) -> str:
    paths = [str(common.HERE.parent / "src"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"python {' '.join(arguments)}\n{done.stderr[-3000:]}")
    return done.stdout


def measure_import(options: Any) -> dict[str, float]:
    """Seconds, in processes of their own, files in the page cache."""
    return {"figure": statistics.median(float(python("-c", IMPORT)) for _ in range(STARTS))}


def measure_runner(script: str) -> Callable[[Any], dict[str, float]]:
    """Seconds that the runner adds to a script."""

    def measure(options: Any) -> dict[str, float]:
        found: dict[bool, list[float]] = {False: [], True: []}
        for _ in range(STARTS):
            for through, seconds in found.items():
                start = time.perf_counter()
                python(*(RUNNER if through else ()), "-c", script)
                seconds.append(time.perf_counter() - start)
        plain, through = statistics.median(found[False]), statistics.median(found[True])
        return {"figure": through - plain, "plain": plain, "through the runner": through}

    return measure


def measure_gain(model: Callable[[], Path], task: str, how: str, against: str) -> Callable[[Any], dict[str, float]]:
    """Times as many tokens a second one way as the other."""

    def measure(options: Any) -> dict[str, float]:
        folder = str(model())
        found: dict[str, list[float]] = {how: [], against: []}
        for _ in range(options.rounds):
            for way, speeds in found.items():
                runner = () if way == "plain" else RUNNER
                flags = ("--how", way, "--task", task, "--threads", str(options.threads))
                printed = python(*runner, str(SCRIPT), folder, *flags).splitlines()[-1]
                speeds.append(json.loads(printed)["tokens_per_second"])
        speed = {way: statistics.median(speeds) for way, speeds in found.items()}
        return {"figure": speed[how] / speed[against], **{f"{way}, tokens/s": one for way, one in speed.items()}}

    return measure


def smollm2() -> Path:
    from lowbit_assets import reference_model

    return reference_model("plain")


def random_1b() -> Path:
    from lowbit_assets import benchmark_model

    return benchmark_model("1.1b")


PROMISES = {
    "import": Promise("import lowbit.compat, without torch", "s", 0.15, True, measure_import),
    "runner": Promise("what the runner adds to a script", "s", 0.3, True, measure_runner("pass")),
    "runner-torch": Promise(
        "what the runner adds to a script that imports torch", "s", 0.3, True, measure_runner("import torch")
    ),
    "decode-small": Promise(
        "decode, bf16, SmolLM2: ipex.llm.optimize / transformers",
        "times",
        2.0,
        False,
        measure_gain(smollm2, "decode", "bf16", "plain"),
    ),
    "decode": Promise(
        "decode, bf16, 1.1 B: ipex.llm.optimize / transformers",
        "times",
        2.0,
        False,
        measure_gain(random_1b, "decode", "bf16", "plain"),
    ),
    "prefill-small": Promise(
        "prefill 512, SmolLM2: W8A8 / bf16",
        "times",
        1.5,
        False,
        measure_gain(smollm2, "prefill", "w8a8", "bf16"),
    ),
    "prefill-small-plain": Promise(
        "prefill 512, SmolLM2: W8A8 / transformers' bf16",
        "times",
        1.5,
        False,
        measure_gain(smollm2, "prefill", "w8a8", "plain"),
    ),
    "prefill": Promise(
        "prefill 512, 1.1 B: W8A8 / bf16",
        "times",
        1.5,
        False,
        measure_gain(random_1b, "prefill", "w8a8", "bf16"),
    ),
    "prefill-plain": Promise(
        "prefill 512, 1.1 B: W8A8 / transformers' bf16",
        "times",
        1.5,
        False,
        measure_gain(random_1b, "prefill", "w8a8", "plain"),
    ),
}


def main() -> None:
    parser = common.parser(__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=tuple(PROMISES), default=list(PROMISES), help="which rows")
    parser.add_argument("--rounds", type=int, default=3, help="processes for each side of a comparison (default: 3)")
    parser.add_argument(
        "--threads", type=int, default=os.cpu_count(), help="threads of both sides (default: all cores)"
    )
    options = parser.parse_args()
    found = {}
    for name in options.only:
        found[name] = PROMISES[name].measure(options)
        print(name, found[name], flush=True)
    rows = [line(PROMISES[name], figures) for name, figures in found.items()]
    text = "What the old names cost, and what they give\n\n" + common.table(
        ("what", "figure", "promised", "kept"), rows
    )
    short = set(options.only) != set(PROMISES)
    folder = common.SCRATCH if short else options.results
    common.write_results(
        folder, "old_apis", "# " + text, {"machine": common.machine(commit=options.commit), "rows": found}
    )


def line(promise: Promise, figures: dict[str, float]) -> tuple[str, ...]:
    rest = ", ".join(f"{name} {value:.3g}" for name, value in figures.items() if name != "figure")
    figure = f"{figures['figure']:.3g} {promise.unit}" + (f" ({rest})" if rest else "")
    bound = f"{'at most' if promise.at_most else 'at least'} {promise.bound:g}"
    return promise.name, figure, bound, "yes" if promise.kept(figures["figure"]) else "no"


if __name__ == "__main__":
    main()
