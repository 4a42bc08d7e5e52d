"""What does choosing a token cost, by setting? Microseconds of the core's selection with the Python around it.

Logits are normal here: with a standard deviation of 4 about as steep as a model's (at temperature 0.8 top-p 0.9 keeps 79 tokens),
and with one of 1.5 flatter than any (13,600 tokens). Each call has other logits, and they lie in the cache, as after a step that
has just written them.

    python benchmarks/next_token.py
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import common
import numpy as np

from lowbit.runtime.selection import Selection, Selector

VOCABULARY = 49152
HISTORY = 1024
POOL = 16
ALLOWED = 100.0  # microseconds: a token of SmolLM2 takes 2,500
STEEPNESS = {"steep": 4.0, "flat": 1.5}
SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "temperature": {"temperature": 0.8},
    "top_k 50": {"temperature": 0.8, "top_k": 50},
    "top_p 0.9": {"temperature": 0.8, "top_p": 0.9},
    "top_k 50, top_p 0.9": {"temperature": 0.8, "top_k": 50, "top_p": 0.9},
    "min_p 0.05": {"temperature": 0.8, "min_p": 0.05},
    "typical_p 0.9": {"temperature": 0.8, "typical_p": 0.9},
    "repetition penalty, greedy": {"repetition_penalty": 1.1},
    "presence, frequency, greedy": {"presence_penalty": 0.5, "frequency_penalty": 0.2},
    "bias of 100 tokens, greedy": {"bias": {token * 7: 0.5 for token in range(100)}},
    "50 bad words, greedy": {"forbidden": tuple((100 + n, 200 + n) for n in range(50))},
    "1,000 bad words, greedy": {"forbidden": tuple((100 + n, 200 + n) for n in range(1000))},
    "all of them": {
        "temperature": 0.8, "top_k": 50, "top_p": 0.9, "min_p": 0.05, "typical_p": 0.9, "repetition_penalty": 1.1,
        "presence_penalty": 0.5, "frequency_penalty": 0.2, "bias": {token * 7: 0.5 for token in range(100)},
        "forbidden": tuple((100 + n, 200 + n) for n in range(50)), "min_new_tokens": 10,
    },
}  # fmt: skip


def measure(settings: dict[str, Any], deviation: float, rounds: int) -> list[float]:
    """Microseconds of each call."""
    draw = np.random.default_rng(0)
    logits = (draw.standard_normal((POOL, VOCABULARY)) * deviation).astype(np.float32)
    history = draw.integers(0, VOCABULARY, HISTORY, dtype=np.int32)
    selector = Selector(Selection(seed=1, **settings), stop_tokens=(2,))
    taken = []
    for index in range(rounds + POOL):
        row = logits[index % POOL]
        row.sum()  # into the cache
        begin = time.perf_counter()
        selector.choose(row, history)
        taken.append((time.perf_counter() - begin) * 1e6)
    return taken[POOL:]


def report(rows: list[dict[str, Any]]) -> str:
    cells = [
        (row["setting"], *(f"{row[name]['median']:.0f} ({row[name]['least']:.0f})" for name in STEEPNESS))
        for row in rows
    ]
    head = ("setting", *(f"{name} logits: median (least), microseconds" for name in STEEPNESS))
    return (
        "# What choosing a token costs\n\n"
        f"A vocabulary of {VOCABULARY:,} and {HISTORY:,} tokens so far, one thread. At most {ALLOWED:.0f} are wanted.\n\n"
        + common.table(head, cells)
    )


def main() -> None:
    parser = common.parser(__doc__ or "")
    parser.add_argument("--rounds", type=int, default=300, help="calls of each setting")
    chosen = parser.parse_args()
    rows = []
    for name, settings in SETTINGS.items():
        row: dict[str, Any] = {"setting": name}
        for steepness, deviation in STEEPNESS.items():
            taken = measure(settings, deviation, chosen.rounds)
            row[steepness] = {"median": statistics.median(taken), "least": min(taken)}
        rows.append(row)
    data = {"machine": common.machine(commit=chosen.commit), "rows": rows}
    common.write_results(chosen.results, "next_token", report(rows), data)


if __name__ == "__main__":
    main()
