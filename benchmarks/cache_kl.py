"""What does a cache in int8 cost? The distance of the engine's predictions from those with keys and values in fp32.

The reference model off its grid (see `lowbit_assets.reference`), weights and products in fp32, so that nothing differs but the
cache. Windows of 1024 tokens are read whole; the mean KL divergence counts every position, and once more the last quarter,
where a query looks back over the most keys. The engine's default follows from the result: int8 may be one where it costs less than
`ALLOWED`, and is one where products round their inputs to int8 too; where they round nothing it would be the only loss.

    python benchmarks/cache_kl.py --windows 4
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import common
import numpy as np
from numpy.typing import NDArray

from lowbit.core.threads import set_threads
from lowbit.runtime import load
from lowbit.runtime.generation import log_softmax
from lowbit_assets import chunks, reference_model, text

TEXTS = ("sqlite_valid", "moby_dick")
CACHES = ("fp16", "int8")
WINDOW = 1024
# What a 4-bit recipe costs is 0.2 to 0.3 (results/default_format.md): a cache that adds less than this is not noticed beside it.
ALLOWED = 0.005

Floats = NDArray[np.float64]


def divergences(expected: NDArray[np.float32], found: NDArray[np.float32]) -> tuple[Floats, Floats]:
    """KL divergence and agreement of the likeliest token at every position."""
    p, q = log_softmax(expected), log_softmax(found)
    kl = (np.exp(p, dtype=np.float64) * (p.astype(np.float64) - q)).sum(-1)
    return kl, (expected.argmax(-1) == found.argmax(-1)).astype(np.float64)


def measure(folder: Path, windows: int, threads: int) -> list[dict[str, Any]]:
    set_threads(threads)
    models = {cache: load(folder, context=WINDOW + 1, cache=cache, compute="fp32") for cache in ("fp32", *CACHES)}
    rows = []
    for name in TEXTS:
        tokens = models["fp32"].tokenizer.encode(text(name), special=False)
        gathered: dict[str, list[tuple[Floats, Floats]]] = {cache: [] for cache in CACHES}
        for window in chunks(tokens, WINDOW, windows):
            expected = models["fp32"].logits(window)
            for cache in CACHES:
                gathered[cache].append(divergences(expected, models[cache].logits(window)))
        rows += [row_of(name, cache, pairs) for cache, pairs in gathered.items()]
    return rows


def row_of(name: str, cache: str, pairs: list[tuple[Floats, Floats]]) -> dict[str, Any]:
    means = [float(kl.mean()) for kl, _ in pairs]
    return {
        "text": name,
        "cache": cache,
        "kl": float(np.mean(means)),
        "error": float(np.std(means, ddof=1) / np.sqrt(len(means))) if len(means) > 1 else 0.0,
        "kl_end": float(np.mean([kl[-WINDOW // 4 :].mean() for kl, _ in pairs])),
        "worst": max(float(kl.max()) for kl, _ in pairs),
        "top1": float(np.mean([same.mean() for _, same in pairs])),
    }


def report(rows: list[dict[str, Any]], windows: int) -> str:
    head = ("text, cache", "KL", "KL, last quarter", "largest", "top 1")
    cells = [
        (
            f"{row['text']}, {row['cache']}",
            f"{row['kl']:.2e} ± {row['error']:.0e}",
            f"{row['kl_end']:.2e}",
            f"{row['worst']:.2e}",
            f"{row['top1']:.2%}",
        )
        for row in rows
    ]
    return (
        "# What a cache in int8 costs\n\n"
        f"SmolLM2-135M-Instruct off its grid, weights and products in fp32, {windows} windows of {WINDOW} tokens of each text. "
        "KL is the mean over positions of the divergence from the same model with its cache in fp32. "
        f"{verdict(rows)}\n\n" + common.table(head, cells)
    )


def verdict(rows: list[dict[str, Any]]) -> str:
    """What follows for the default."""
    most = max(row["kl"] for row in rows if row["cache"] == "int8")
    said = f"A default may cost {ALLOWED}; int8 costs {most:.4f} at most"
    if most > ALLOWED:
        return f"{said}, too much for one."
    return (
        f"{said}: it is the default where products round their inputs to int8 as well (low-bit weights), and fp16 is "
        "elsewhere, and in `generate` of transformers, whose tokens it promises."
    )


def main() -> None:
    parser = common.parser(__doc__ or "")
    parser.add_argument("--windows", type=int, default=4, help="windows of each text")
    parser.add_argument("--threads", type=int, default=2)
    chosen = parser.parse_args()
    rows = measure(reference_model("off_grid"), chosen.windows, chosen.threads)
    data = {"machine": common.machine(commit=chosen.commit), "rows": rows}
    common.write_results(chosen.results, "cache_kl", report(rows, chosen.windows), data)


if __name__ == "__main__":
    main()
