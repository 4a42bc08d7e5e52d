"""`lowbit inspect`: what lies in a checkpoint, without loading it."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowbit.cli.listing import Hints, StoredWeight, hints_from, list_weights
from lowbit.cli.options import add_json, path
from lowbit.cli.output import Output, count_of, count_text, size_text
from lowbit.contents import (
    ACTIVATIONS,
    CONFIG,
    OWN_CONFIG,
    REPORT,
    StoredTensor,
    gguf_in,
    is_gguf,
    missing,
    quantization_config,
    read_header,
    read_json,
    read_tensors,
)
from lowbit.errors import CheckpointError, understood
from lowbit.report import Report

DESCRIPTION = """\
List what lies in a checkpoint: layers, formats, sizes. Only headers are read, so it takes no memory and no torch.

MODEL is a folder (Hugging Face, lowbit, compressed-tensors, GPTQ, AWQ, bitsandbytes), a .safetensors file or a .gguf
file. Layers that differ only in their number share a line."""
EXAMPLES = """\
  lowbit inspect ./small
  lowbit inspect ./small --all               every layer on its own line
  lowbit inspect model-q4_k_m.gguf
  lowbit inspect ./small --json | jq .bits_per_weight"""
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")
_HEADERS = ("weight", "count", "format", "shape", "bits/weight", "size")
_RIGHT = ("count", "bits/weight", "size")
# Where GPTQ and AWQ tools kept their settings before they went into config.json.
_OLD_CONFIGS = ("quantize_config.json", "quant_config.json")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as its headers tell it."""

    path: Path
    facts: dict[str, Any]
    weights: list[StoredWeight]
    files: int

    @property
    def nbytes(self) -> int:
        return sum(weight.nbytes for weight in self.weights)

    @property
    def count(self) -> int:
        return sum(weight.weights for weight in self.weights)

    @property
    def bits_per_weight(self) -> float:
        return self.nbytes * 8 / max(self.count, 1)

    def formats(self) -> dict[str, dict[str, int]]:
        """Per format: how many tensors, weights and bytes; the largest first."""
        totals: dict[str, dict[str, int]] = {}
        for weight in self.weights:
            total = totals.setdefault(weight.format, {"tensors": 0, "weights": 0, "bytes": 0})
            total["tensors"] += 1
            total["weights"] += weight.weights
            total["bytes"] += weight.nbytes
        return dict(sorted(totals.items(), key=lambda item: -item[1]["bytes"]))

    def to_dict(self) -> dict[str, Any]:
        totals = {
            "path": str(self.path),
            "files": self.files,
            "bytes": self.nbytes,
            "weights": self.count,
            "bits_per_weight": round(self.bits_per_weight, 4),
            "formats": self.formats(),
        }
        return totals | self.facts | {"layers": [weight.to_dict() for weight in self.weights]}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", type=path, help="a folder, a .safetensors file or a .gguf file")
    parser.add_argument("--all", action="store_true", help="one line for every weight")
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    output = Output(options.json)
    checkpoint = read_checkpoint(options.model)
    print_checkpoint(output, checkpoint, options.all)
    output.result(checkpoint.to_dict())
    return 0


def read_checkpoint(path: Path) -> Checkpoint:
    """A checkpoint of any kind, from its headers."""
    if path.is_dir():
        return _read_model_folder(path)
    if not path.exists():
        raise CheckpointError(missing(path))
    if is_gguf(path):
        metadata, tensors = read_gguf(path)
        facts = {"model_type": metadata.get("general.architecture"), "quant_method": "gguf"}
        return _checkpoint(path, tensors, facts, Hints())
    if path.suffix == ".safetensors":
        return _checkpoint(path, read_header(path), *_about(path.parent))
    raise CheckpointError(f"{path} is no checkpoint: name a folder, a .safetensors file or a .gguf file")


def read_gguf(path: Path) -> tuple[dict[str, Any], list[StoredTensor]]:
    """The metadata and the tensors of a GGUF file, with GGUF's names for both."""
    from lowbit.interop.gguf_container import read_container

    container = read_container(path)
    tensors = [StoredTensor(e.name, e.type.name, e.shape, e.data.nbytes, path) for e in container.entries.values()]
    return container.metadata, tensors


def _read_model_folder(folder: Path) -> Checkpoint:
    gguf = gguf_in(folder)
    if gguf is not None:
        return read_checkpoint(gguf)
    return _checkpoint(folder, read_tensors(folder), *_about(folder))


def _about(folder: Path) -> tuple[dict[str, Any], Hints]:
    """What the JSON of a folder says of the weights in it."""
    config = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    quantization = _quantization_config(folder, config)
    facts = {
        "model_type": config.get("model_type"),
        "architecture": _first(config.get("architectures")),
        "quant_method": quantization.get("quant_method"),
    }
    if (folder / ACTIVATIONS).is_file():
        facts["activation_ranges"] = read_json(folder / ACTIVATIONS).get("ranges")
    return facts, _hints(folder, quantization)


def _first(names: Any) -> str | None:
    return str(names[0]) if isinstance(names, list) and names else None


def _quantization_config(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """How the folder says it was quantised: in its config, in lowbit's own for torch modules, or in the file of an older tool."""
    own = quantization_config(config)
    if own is not None:
        return own
    if (folder / OWN_CONFIG).is_file():
        return read_json(folder / OWN_CONFIG)
    old = next((folder / name for name in _OLD_CONFIGS if (folder / name).is_file()), None)
    if old is None:
        return {}
    method = "gptq" if old.name == _OLD_CONFIGS[0] else "awq"
    return {"quant_method": method} | read_json(old)


def _hints(folder: Path, quantization: dict[str, Any]) -> Hints:
    report = Report.from_dict(read_json(folder / REPORT)) if (folder / REPORT).is_file() else Report()
    with understood(_odd(folder)):
        return hints_from(quantization, report)


def _odd(path: Path) -> str:
    return f"{path}: what it says of its quantisation is damaged"


def _checkpoint(path: Path, tensors: list[StoredTensor], facts: dict[str, Any], hints: Hints) -> Checkpoint:
    with understood(_odd(path)):
        weights = list_weights(tensors, hints)
    return Checkpoint(path, facts, weights, len({tensor.file for tensor in tensors}))


def print_checkpoint(output: Output, checkpoint: Checkpoint, everything: bool) -> None:
    facts = checkpoint.facts
    kind = " ".join(str(facts[key]) for key in ("architecture", "model_type") if facts.get(key))
    output.facts(
        [
            ("checkpoint", f"{checkpoint.path} ({count_of(checkpoint.files, 'file')})"),
            ("model", kind or f"unknown: there is no {CONFIG}"),
            ("quantised by", str(facts.get("quant_method") or "nothing")),
            ("weights", f"{count_text(checkpoint.count)} in {size_text(checkpoint.nbytes)}"),
            ("bits per weight", f"{checkpoint.bits_per_weight:.2f}"),
            *_activations(facts.get("activation_ranges")),
        ]
    )
    output.say()
    groups = [[weight] for weight in checkpoint.weights] if everything else _alike(checkpoint.weights)
    output.table(_HEADERS, [_row(group) for group in groups], right=_RIGHT)
    output.say()
    totals = checkpoint.formats().items()
    rows = [(name, str(t["tensors"]), count_text(t["weights"]), size_text(t["bytes"])) for name, t in totals]
    output.table(("format", "count", "weights", "size"), rows, right=("count", "weights", "size"))


def _activations(ranges: Any) -> list[tuple[str, str]]:
    """A line for layers that round activations to fixed ranges."""
    if not isinstance(ranges, dict):
        return []
    return [("activations", f"rounded to the ranges of {count_of(len(ranges), 'layer')} in {ACTIVATIONS}")]


def _alike(weights: Iterable[StoredWeight]) -> list[list[StoredWeight]]:
    """Weights that differ only in the numbers of their path, together."""
    groups: dict[tuple[str, str, tuple[int, ...]], list[StoredWeight]] = {}
    for weight in weights:
        groups.setdefault((_NUMBER.sub("*", weight.path), weight.format, weight.shape), []).append(weight)
    return list(groups.values())


def _row(group: list[StoredWeight]) -> list[str]:
    first = group[0]
    path = first.path if len(group) == 1 else _NUMBER.sub("*", first.path)
    size = size_text(sum(weight.nbytes for weight in group))
    shape = "x".join(map(str, first.shape)) or "scalar"
    return [path, str(len(group)), first.format, shape, f"{first.bits_per_weight:.2f}", size]
