"""Who is measured by quality.py: formats, our algorithms and the peers', each row as settings for a worker.

A worker (`peers/workers/round_*.py`) rounds the linears of the blocks by the settings of a row and writes what they
would be read back as. GGUF files are made by llama-quantize and read here, without a worker.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import common  # noqa: F401  (puts src and assets on the path)

from lowbit.formats import as_format

OURS = "lowbit"
LLAMA = "llama.cpp"
# As the issue of quality names them: W8, W4 per channel and in groups, W3, W2.
FORMATS = {
    "W8": "int8_channel",
    "W4": "int4_channel",
    "W4 g64": "int4_g64",
    "W4 g32": "int4_g32",
    "W3 g64": "int3_g64",
    "W2 g64": "int2_g64",
    "W2 g32": "int2_g32",
}
FEW_BITS = ("W3 g64", "W2 g64", "W2 g32")
# What the published methods for few bits are about, and the usual 4 bit.
USUAL = ("W4", "W4 g64", *FEW_BITS)
UP_TO_4 = tuple(scheme for scheme in FORMATS if scheme != "W8")
W8A8 = "W8A8"


@dataclass(frozen=True)
class Row:
    """One algorithm of one program at one format. `scheme` is a key of FORMATS, or the type of a GGUF file."""

    program: str
    algorithm: str
    scheme: str
    settings: dict[str, Any] = field(default_factory=dict, compare=False)
    activations: bool = False  # inputs of linears are rounded to int8 as well

    @property
    def name(self) -> str:
        return f"{self.program} {self.algorithm}, {self.scheme}"


def _ours(rounder: str, scaler: str = "", calibrated: bool = True, zeros: str = "", **options: Any) -> dict[str, Any]:
    return {
        "rounder": rounder,
        "scaler": scaler,
        "calibrated": calibrated,
        "options": options,
        "zeros": zeros,
    }


# Our algorithms: their settings, and the formats that they are measured at.
EVERY = tuple(FORMATS)
ALGORITHMS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "plain rtn": (_ours("plain_rtn", calibrated=False), EVERY),
    "rtn": (_ours("rtn", calibrated=False), EVERY),
    "rtn + importance": (_ours("rtn"), EVERY),
    "hqq": (_ours("hqq", calibrated=False), EVERY),
    # Where a step is as wide as a whole row makes it, zero points that leave 0 off the grid cost more than they give.
    "hqq asym": (_ours("hqq", calibrated=False, zeros="asym"), ("W8", "W4")),
    "hqq fine": (_ours("hqq", calibrated=False, zeros="fine"), UP_TO_4),
    "gptq": (_ours("gptq"), EVERY),
    "gptq uncorrected": (_ours("gptq", correction=0.0), EVERY),
    "awq": (_ours("rtn", "awq"), EVERY),
    "teq": (_ours("rtn", "teq"), EVERY),
    "autoround": (_ours("autoround"), EVERY),
    "awq + gptq": (_ours("gptq", "awq", correction=0.25), ("W4 g64", *FEW_BITS)),
    "awq + autoround": (_ours("autoround", "awq"), FEW_BITS),
    "awq + gptq asym": (_ours("gptq", "awq", zeros="asym", correction=0.25), FEW_BITS),
    "awq + autoround asym": (_ours("autoround", "awq", zeros="asym"), FEW_BITS),
}
# Peers: the worker, settings, and the formats. llm-compressor stands for the GPTQ of gptqmodel, whose 7.7.0 wants a torch
# (2.14.1) newer than the one that all rows share. llm-compressor's own AWQ pins memory, which takes a GPU.
PEERS: dict[tuple[str, str], tuple[str, dict[str, Any], tuple[str, ...]]] = {
    # In fp32: by default it casts the model to bf16 first, and both it and we would be judged by that.
    ("auto-round", "rtn"): ("autoround", {"iterations": 0, "optimised": False, "amp": False}, EVERY),
    ("auto-round", "opt-rtn"): ("autoround", {"iterations": 0, "optimised": True}, EVERY),
    ("auto-round", "awq"): ("autoround", {"iterations": 0, "algorithm": "awq"}, EVERY),
    ("auto-round", "autoround"): ("autoround", {"iterations": 200}, EVERY),
    # Off by default: a searched first scale by importance, and a loss without outliers. Symmetric formats alone have them.
    ("auto-round", "autoround ext"): ("autoround", {"iterations": 200, "extended": True}, USUAL),
    ("auto-round", "autoround asym"): ("autoround", {"iterations": 200, "symmetric": False}, FEW_BITS),
    # Off by default too: scale and zero point searched together.
    ("auto-round", "autoround asym searched"): (
        "autoround",
        {"iterations": 200, "symmetric": False, "searched": True},
        FEW_BITS,
    ),
    ("llm-compressor", "gptq"): ("llmcompressor", {"algorithm": "gptq"}, EVERY),
    # Its scales reach from end to end by default; these search them, which few bits live by.
    ("llm-compressor", "gptq mse"): ("llmcompressor", {"algorithm": "gptq", "observer": "memoryless_mse"}, USUAL),
    ("llm-compressor", "gptq asym mse"): (
        "llmcompressor",
        {"algorithm": "gptq", "observer": "memoryless_mse", "symmetric": False},
        FEW_BITS,
    ),
    ("llm-compressor", "awq"): ("llmcompressor", {"algorithm": "awq"}, EVERY),
    ("hqq", "hqq"): ("hqq", {"axis": 1}, EVERY),
    ("hqq", "hqq, groups down"): ("hqq", {"axis": 0}, ("W4 g64", "W4 g32", *FEW_BITS)),
}
# GGUF files as a model gets them whose rows hold whole blocks of 256.
GGUF = ("Q4_K_M", "Q3_K_M", "Q2_K")


def peer_settings(scheme: str) -> dict[str, Any]:
    """A format as numbers, which every project understands: 0 stands for a group of the whole row."""
    format = as_format(FORMATS[scheme])
    return {"bits": format.bits, "group": max(format.group_size, 0), "symmetric": format.symmetric}


def our_settings(found: dict[str, Any], scheme: str) -> dict[str, Any]:
    name = FORMATS[scheme]
    bits, _, rest = name.partition("_")
    if found["zeros"]:
        name = f"{bits}_{found['zeros']}_{rest}"
    return {key: value for key, value in found.items() if key != "zeros"} | {"format": name}


def all_rows() -> Iterator[Row]:
    """Every row but those that depend on another's bits, format by format."""
    for scheme in FORMATS:
        for algorithm, (found, schemes) in ALGORITHMS.items():
            if scheme in schemes:
                yield Row(OURS, algorithm, scheme, our_settings(found, scheme))
        for (program, algorithm), (worker, settings, schemes) in PEERS.items():
            if scheme in schemes:
                yield Row(program, algorithm, scheme, {"worker": worker} | peer_settings(scheme) | settings)
    smooth = _ours("rtn", "smoothquant") | {"format": "w8a8"}
    smooth.pop("zeros")
    yield Row(OURS, "rtn", W8A8, smooth | {"scaler": "", "calibrated": False}, activations=True)
    yield Row(OURS, "smoothquant", W8A8, smooth, activations=True)
    settings = {"worker": "llmcompressor", "algorithm": "smoothquant", "bits": 8, "group": 0, "symmetric": True}
    yield Row("llm-compressor", "smoothquant", W8A8, settings, activations=True)
    for kind in GGUF:
        yield Row(LLAMA, kind, kind)


def allocated(kind: str, bits: float, algorithm: str = "gptq") -> Row:
    """Ours with the bits of each linear allocated, so that all together have those of a GGUF file."""
    settings = our_settings(_ours(algorithm, **({"correction": 0.25} if algorithm == "gptq" else {})), "W4 g64")
    return Row(OURS, f"{algorithm}, bits allocated", kind, settings | {"budget": bits})


def stored_bits(shapes: list[tuple[int, int]], bits: int, group: int, zero_bits: float) -> float:
    """Bits of a weight with an fp16 scale, and a zero point of so many bits, for each group of a row."""
    weights = sum(rows * columns for rows, columns in shapes)
    groups = sum(rows * (-(-columns // group) if group else 1) for rows, columns in shapes)
    return bits + groups * (16 + zero_bits) / weights


def worker_of(row: Row) -> str:
    return str(row.settings.get("worker", OURS))


def gguf_file(peers: Path, kind: str) -> Path:
    return peers / "models" / f"smollm2-padded-{kind}.gguf"
