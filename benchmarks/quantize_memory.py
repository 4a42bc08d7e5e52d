"""How much memory does it take to calibrate a model that lies in files? Every figure in a process of its own.

The model is "the 1.1 B" of `lowbit_assets.benchmark`: random, bf16, four shards. GPTQ with its defaults, on a few windows
of random tokens: what they hold of activations is a term of the limit, everything else does not depend on them. Memory is
the largest resident set of the process, interpreter, libraries and pages of the mapped shards included, from its start
until the model is low-bit and can answer. The limit:

    its low-bit size + one block in full precision + activations + 1 GB

Activations are those of one block: what it is called with and what it gives, in full precision and after rounded blocks,
and what its groups of linears get in full precision.

    python benchmarks/quantize_memory.py                 the 1.1 B
    python benchmarks/quantize_memory.py --size 13m      the same in seconds, to try the script
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import common

from lowbit.contents import read_json
from lowbit_assets import benchmark_model

MEGABYTE = 1_000_000
ROOM = 1000 * MEGABYTE
BYTES = 2  # of a number in bf16
# What a block is called with and gives, twice: in full precision, and behind rounded blocks.
STREAMS = 4
CODE = """
import json, resource, time
import torch
import lowbit
from lowbit.recipe import recipe_named
torch.set_num_threads(THREADS)
tokens = torch.randint(3, VOCABULARY, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(0))
recipe = recipe_named(FORMAT).replace(rounder='gptq')
start = time.perf_counter()
model = lowbit.AutoModelForCausalLM.from_pretrained(SOURCE, recipe=recipe, calibration=tokens)
seconds = time.perf_counter() - start
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({'seconds': seconds, 'peak': peak, 'size': model.lowbit_report.bytes_after}))
"""


def run(names: dict[str, Any]) -> dict[str, float]:
    """What a fresh interpreter measures."""
    given = "".join(f"{name} = {value!r}\n" for name, value in names.items())
    done = subprocess.run([sys.executable, "-c", given + CODE], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"the measurement failed:\n{done.stderr.strip()}")
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def block_bytes(config: dict[str, Any]) -> int:
    """One block of a Llama: two norms, and its seven linears."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    values = config["num_key_value_heads"] * config["head_dim"]
    return BYTES * (2 * hidden + 2 * hidden * hidden + 2 * hidden * values + 3 * hidden * inner)


def activation_bytes(config: dict[str, Any], tokens: int) -> int:
    """The streams, and what query, key and value; output; gate and up; down get."""
    return BYTES * tokens * ((STREAMS + 3) * config["hidden_size"] + config["intermediate_size"])


def main() -> None:
    parser = common.parser(__doc__.splitlines()[0])
    parser.add_argument("--size", default="1.1b", help="a size of lowbit_assets.benchmark_model")
    parser.add_argument("--format", default="int4_g64", help="the format of every linear and the head")
    parser.add_argument("--samples", type=int, default=16, help="windows of tokens")
    parser.add_argument("--length", type=int, default=512, help="tokens of a window")
    parser.add_argument("--threads", type=int, default=2)
    chosen = parser.parse_args()
    source: Path = benchmark_model(chosen.size)
    config = read_json(source / "config.json")
    names = {"SOURCE": str(source), "FORMAT": chosen.format, "SAMPLES": chosen.samples, "LENGTH": chosen.length}
    found = run(names | {"THREADS": chosen.threads, "VOCABULARY": config["vocab_size"]})
    terms = {
        "its low-bit size": int(found["size"]),
        "one block in full precision": block_bytes(config),
        f"activations of {chosen.samples} x {chosen.length} tokens": activation_bytes(
            config, chosen.samples * chosen.length
        ),
        "room": ROOM,
    }
    limit = sum(terms.values())
    rows = [(name, f"{value / MEGABYTE:.0f} MB") for name, value in terms.items()]
    verdict = "kept" if found["peak"] <= limit else "**missed**"
    rows += [("limit", f"{limit / MEGABYTE:.0f} MB"), (f"peak, {verdict}", f"{found['peak'] / MEGABYTE:.0f} MB")]
    rows += [("seconds", f"{found['seconds']:.0f}")]
    table = common.table(("what", "value"), rows)
    text = (
        f"# Memory of calibrated quantisation: GPTQ of the {chosen.size} benchmark model, {chosen.format}\n\n{table}\n"
    )
    print(text)
    data = {"machine": common.machine(commit=chosen.commit), "terms": terms, "limit": limit, "found": found}
    usual = chosen.size == parser.get_default("size")
    common.write_results(chosen.results if usual else common.SCRATCH, "quantize_memory", text, data)


if __name__ == "__main__":
    main()
