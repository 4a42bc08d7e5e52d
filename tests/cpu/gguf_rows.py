"""Rows of GGUF's types to test with."""

from __future__ import annotations

import gguf
import numpy as np


def random_rows(kind: str, rows: int, columns: int) -> np.ndarray:
    """Rows of a GGUF type: of a weight, or random bytes with factors of ordinary size where the library cannot write it."""
    random, type_ = np.random.default_rng(0), gguf.GGMLQuantizationType[kind]
    if not kind.endswith("_K"):
        return gguf.quants.quantize(random.standard_normal((rows, columns)).astype(np.float32), type_)
    per_block, size = gguf.GGML_QUANT_SIZES[type_]
    blocks = random.integers(0, 256, (rows * columns // per_block, size), dtype=np.uint8)
    for start in {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,)}.get(kind, (0, 2)):
        blocks[:, start : start + 2] = random.normal(0, 1e-3, len(blocks)).astype(np.float16)[:, None].view(np.uint8)
    return blocks.reshape(rows, -1)
