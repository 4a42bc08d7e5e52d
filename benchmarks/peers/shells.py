"""Carry the form of a model to another machine, and fill it there with random weights.

Speed does not depend on what weights say, but it does depend on the file: its formats, its graph, its groups. So a
machine that can be given megabytes and not gigabytes gets each file without its large tensors, and draws them itself:
codes as random bytes, scales and dense weights as small random numbers. Everything small (shapes, norms, tokenizers,
tables of names) travels as it is.

    python benchmarks/peers/shells.py pack MODELS OUT       here:  MODELS/*.gguf (bf16 and f32), hf-*, openvino-*, ours
    python benchmarks/peers/shells.py fill OUT MODELS       there: the same names, full size
"""

from __future__ import annotations

import json
import shutil
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

sys.path.append(str(Path(__file__).parents[1]))
from peers.entries import OUR_RECIPES, SIZES, made_for, our_folder

SMALL = 1 << 13  # bytes: what is no larger travels, as norms do
SPAN = 1 << 24  # elements drawn at once
STD = 0.02
PLAN, KEPT = ".plan.json", ".kept"
TYPES_OF_OPENVINO = {"f32": "F32", "f16": "F16", "bf16": "BF16"}
GGUF_TYPES = {0: "F32", 1: "F16", 30: "BF16"}


@dataclass(frozen=True)
class Part:
    """A stretch of a file that is drawn: numbers of a type, or bytes."""

    start: int
    size: int
    dtype: str


def parts_of(path: Path) -> list[Part]:
    readers = {".safetensors": safetensors_parts, ".gguf": gguf_parts, ".bin": openvino_parts}
    return sorted((p for p in readers[path.suffix](path) if p.size > SMALL), key=lambda p: p.start)


def safetensors_parts(path: Path) -> Iterator[Part]:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    for name, tensor in header.items():
        if name != "__metadata__":
            start, end = tensor["data_offsets"]
            yield Part(8 + length + start, end - start, tensor["dtype"])


def gguf_parts(path: Path) -> Iterator[Part]:
    import gguf

    for tensor in gguf.GGUFReader(path).tensors:
        yield Part(int(tensor.data_offset), int(tensor.n_bytes), GGUF_TYPES[int(tensor.tensor_type)])


def openvino_parts(path: Path) -> Iterator[Part]:
    for data in ElementTree.parse(path.with_suffix(".xml")).iter("data"):
        if "offset" in data.attrib and "element_type" in data.attrib:
            kind = TYPES_OF_OPENVINO.get(data.attrib["element_type"], "bytes")
            yield Part(int(data.attrib["offset"]), int(data.attrib["size"]), kind)


def pack_file(path: Path, out: Path) -> None:
    """The stretches that are kept, one after another, and the plan of those that are not."""
    parts = parts_of(path)
    with path.open("rb") as file, Path(f"{out}{KEPT}").open("wb") as kept:
        position = 0
        for part in [*parts, Part(path.stat().st_size, 0, "")]:
            file.seek(position)
            kept.write(file.read(part.start - position))
            position = part.start + part.size
    plan = {"size": path.stat().st_size, "parts": [[p.start, p.size, p.dtype] for p in parts]}
    Path(f"{out}{PLAN}").write_text(json.dumps(plan))


def fill_file(shell: Path, out: Path) -> None:
    plan = json.loads(Path(f"{shell}{PLAN}").read_text())
    draw = np.random.default_rng(0)
    with Path(f"{shell}{KEPT}").open("rb") as kept, out.open("wb") as file:
        position = 0
        for start, size, dtype in [*plan["parts"], [plan["size"], 0, "bytes"]]:
            file.write(kept.read(start - position))
            for piece in drawn(draw, size, dtype):
                file.write(piece.tobytes())
            position = start + size


def drawn(draw: np.random.Generator, size: int, dtype: str) -> Iterator[NDArray[np.generic]]:
    """Random contents of one stretch, in pieces."""
    width = {"F32": 4, "F16": 2, "BF16": 2}.get(dtype, 1)
    for start in range(0, size // width, SPAN):
        count = min(SPAN, size // width - start)
        if dtype not in ("F32", "F16", "BF16"):
            yield draw.integers(0, 256, count, np.uint8)
            continue
        numbers = draw.standard_normal(count, np.float32) * np.float32(STD)
        if dtype == "F16":  # the scales of packed weights: small and positive
            yield (np.abs(numbers) / 8 + np.float32(STD / 8)).astype(np.float16)
        else:
            yield (numbers.view(np.uint32) >> 16).astype(np.uint16) if dtype == "BF16" else numbers


def is_large(path: Path) -> bool:
    names = path.suffix in (".safetensors", ".gguf") or path.name == "openvino_model.bin"
    return path.is_file() and names


def ours(models: Path) -> Iterator[Path]:
    """Our folders that the benchmarks read, without those that another stands in for."""
    for model in SIZES:
        folders = {our_folder(models, model, name) for name in OUR_RECIPES if name != "bf16" and made_for(model, name)}
        yield from sorted(folder for folder in folders if folder.exists())


def pack(models: Path, out: Path) -> None:
    wanted = [*models.glob("hf-*"), *models.glob("openvino-*-int*"), *models.glob("*-bf16.gguf"), *ours(models)]
    wanted += [p for p in models.glob("*-f32.gguf") if "padded" not in p.name]
    for top in wanted:
        for path in [top] if top.is_file() else sorted(p for p in top.glob("**/*") if p.is_file()):
            target = out / path.relative_to(models)
            target.parent.mkdir(parents=True, exist_ok=True)
            if is_large(path):
                pack_file(path, target)
            else:
                shutil.copy(path, target)


def fill(shells: Path, out: Path) -> None:
    with ProcessPoolExecutor() as pool:  # a processor draws 300 MB a second, and the models are 12 GB
        filled = []
        for path in sorted(p for p in shells.rglob("*") if p.is_file() and not p.name.endswith(KEPT)):
            target = out / path.relative_to(shells)
            target.parent.mkdir(parents=True, exist_ok=True)
            if path.name.endswith(PLAN):
                name = path.name.removesuffix(PLAN)
                filled.append(pool.submit(fill_file, path.with_name(name), target.with_name(name)))
            else:
                shutil.copy(path, target)
        for each in filled:
            each.result()


if __name__ == "__main__":
    {"pack": pack, "fill": fill}[sys.argv[1]](Path(sys.argv[2]), Path(sys.argv[3]))
