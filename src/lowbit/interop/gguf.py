"""Reading GGUF, llama.cpp's file, as a source of weights, a config and a tokenizer in Hugging Face's terms.

    model = open_gguf("model.Q4_K_M.gguf")            # maps the file; reads nothing but its header
    model.config, model.generation_config             # what config.json and generation_config.json would say
    model.tensors["model.layers.0.mlp.up_proj.weight"].read("bfloat16")
    model.tokenizer_json(), model.tokenizer_config
    write_hf_folder("model.gguf", "folder")           # all of it as a folder, one tensor in memory at a time

Names and shapes are those of a Hugging Face checkpoint, and what llama.cpp's converters changed is undone: w_hf =
undo(blocks), where undo is nearly always an order of rows. Rows are whole blocks, so `raw()` gives packed rows in
Hugging Face's order without unpacking. Any storage type can be read that the `gguf` package de-quantises. Neither
torch nor transformers is imported.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lowbit.errors import CheckpointError
from lowbit.interop.gguf_config import build_config, build_generation_config, find_family, head_dim
from lowbit.interop.gguf_container import (
    Bytes,
    Container,
    Entry,
    decode_blocks,
    normalise_dtype,
    read_container,
    round_to,
)
from lowbit.interop.gguf_tokenizer import build_tokenizer, build_tokenizer_config
from lowbit.interop.safetensors_stream import write_safetensors
from lowbit.models.gguf_names import NOT_WEIGHTS, GgufFamily, TensorRow

SAFETENSORS_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
DEFAULT_SHARD_BYTES = 4 * 10**9
CHAT_TEMPLATE_FILE = "chat_template.jinja"

_BLOCK_NAME = re.compile(r"blk\.(\d+)\.(.+)\.(weight|bias)")
_EXPERT_STEM = re.compile(r"(.+)\.(\d+)")


@dataclass(frozen=True, slots=True)
class Heads:
    """The attention sizes that some row orders depend on."""

    query: int
    key_value: int
    width: int


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One weight of the model, still on disk. `index` picks one matrix of a stack (experts)."""

    name: str
    entry: Entry
    change: str
    heads: Heads
    index: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape `read` returns: [out, in] for a matrix."""
        stored = self.entry.shape if self.index is None else self.entry.shape[1:]
        match self.change:
            case "transpose":
                return tuple(reversed(stored))
            case "as_row":
                return (1, *stored) if len(stored) == 1 else stored
        return stored

    @property
    def type_name(self) -> str:
        """How it is stored: "Q4_1", "F32", ..."""
        return self.entry.type.name

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return int(self._packed().size)

    def raw(self) -> Bytes:
        """The packed blocks, uint8 [rows, bytes of a row], rows in Hugging Face's order (a vector block by block)."""
        if self.change in ("transpose", "minus_one"):
            raise CheckpointError(
                f"'{self.name}' has no packed form in Hugging Face's layout ({self.change}): use read()"
            )
        packed = self._packed()
        order = _row_order(self.change, self.heads, packed.shape[0])
        return packed if order is None else packed[order]

    def read(self, dtype: object = "float32") -> npt.NDArray[Any]:
        """The weight as numbers: float32, float16, or bfloat16 as its bits in uint16 (numpy has no bfloat16)."""
        name = normalise_dtype(dtype)
        if self.change == "minus_one":
            # In fp32: subtracting after rounding to 16 bits would lose what the 1 pushed out of them.
            exact = decode_blocks(self._packed(), self.entry.type, "float32") - np.float32(1)
            return round_to(exact, name).reshape(self.shape)
        if self.change == "transpose":
            stored = decode_blocks(self._packed(), self.entry.type, name).reshape(self.entry.shape)
            return np.ascontiguousarray(stored.T)
        return decode_blocks(self.raw(), self.entry.type, name).reshape(self.shape)

    def _packed(self) -> Bytes:
        data = self.entry.data
        if self.index is not None:
            data = data.reshape(self.entry.shape[0], -1)[self.index]
        is_vector = len(self.entry.shape) - (self.index is not None) == 1
        return data.reshape(-1, self.entry.type.block_bytes if is_vector else self.entry.row_bytes)


def _row_order(change: str, heads: Heads, rows: int) -> npt.NDArray[np.intp] | None:
    """Which stored row each row of the Hugging Face weight is; None if they are in order."""
    stored = np.arange(rows)
    match change:
        case "rotary_q" | "rotary_k":
            count = heads.query if change == "rotary_q" else heads.key_value
            return stored.reshape(count, -1, 2).swapaxes(1, 2).reshape(-1)
        case "qkv_heads":
            return stored.reshape(3, heads.query, -1).swapaxes(0, 1).reshape(-1)
        case "qkv_groups":
            ends = [heads.query * heads.width, (heads.query + heads.key_value) * heads.width]
            groups = [part.reshape(heads.key_value, -1) for part in np.split(stored, ends)]
            return np.concatenate(groups, axis=1).reshape(-1)
    return None


class GgufModel:
    """An opened GGUF file. Everything is computed when asked for; the weights stay on disk."""

    def __init__(self, container: Container) -> None:
        self.container = container
        self.family: GgufFamily = find_family(container)
        self.tensors: dict[str, GgufTensor] = {tensor.name: tensor for tensor in _name_tensors(container, self.family)}
        _check_layers(container)

    @property
    def architecture(self) -> str:
        """GGUF's name of the family, such as "llama"."""
        return self.family.architecture

    @property
    def metadata(self) -> dict[str, Any]:
        """GGUF's own key-value pairs."""
        return self.container.metadata

    @cached_property
    def config(self) -> dict[str, Any]:
        """The model's config.json."""
        return build_config(self.container, self.family)

    @cached_property
    def generation_config(self) -> dict[str, Any]:
        """The model's generation_config.json."""
        return build_generation_config(self.container)

    @cached_property
    def tokenizer_config(self) -> dict[str, Any]:
        """The model's tokenizer_config.json, chat template included."""
        return build_tokenizer_config(self.container)

    def tokenizer_json(self) -> str:
        """The model's tokenizer.json, for the tokenizers library."""
        return build_tokenizer(self.container)

    def write_tokenizer(self, folder: Path) -> None:
        """The tokenizer as the files of a Hugging Face folder, the chat template in one of its own."""
        fields = dict(self.tokenizer_config)
        template = fields.pop("chat_template", None)
        if isinstance(template, str):
            (folder / CHAT_TEMPLATE_FILE).write_text(template, encoding="utf-8")
        _write_json(folder / "tokenizer_config.json", fields)
        (folder / "tokenizer.json").write_text(self.tokenizer_json(), encoding="utf-8")


def open_gguf(path: str | Path) -> GgufModel:
    """Open a GGUF file, or the first of a split series."""
    return GgufModel(read_container(path))


def _name_tensors(container: Container, family: GgufFamily) -> Iterator[GgufTensor]:
    prefix = family.architecture
    query = int(container.require(f"{prefix}.attention.head_count"))
    # One head for all queries is what a file without the key means for Falcon; elsewhere as many as queries.
    fewest = 1 if prefix == "falcon" else query
    heads = Heads(query, int(container.metadata.get(f"{prefix}.attention.head_count_kv", fewest)), head_dim(container))
    rows = {row.gguf: row for row in family.tensors}
    for entry in container.entries.values():
        yield from _name_entry(entry, rows, family, heads)


def _name_entry(entry: Entry, rows: dict[str, TensorRow], family: GgufFamily, heads: Heads) -> Iterator[GgufTensor]:
    block = _BLOCK_NAME.fullmatch(entry.name)
    layer, stem, suffix = block.groups() if block else ("", *entry.name.rpartition(".")[::2])
    if stem in NOT_WEIGHTS:
        return
    expert = _EXPERT_STEM.fullmatch(stem)
    row = rows.get(stem) or (rows.get(f"{expert[1]}.{{e}}") if expert else None)
    if row is None:
        raise CheckpointError(f"the tensor '{entry.name}' is no weight that '{family.architecture}' is known to have")
    name = f"{family.layer.format(i=layer)}.{row.hf}.{suffix}" if block else f"{row.hf}.{suffix}"
    if row.change == "split":
        for index in range(entry.shape[0]):
            yield GgufTensor(name.replace("{e}", str(index)), entry, "", heads, index)
        return
    # A bias is a vector: nothing to transpose in it.
    change = "" if row.change == "transpose" and len(entry.shape) == 1 else row.change
    yield GgufTensor(name.replace("{e}", expert[2] if expert else ""), entry, change, heads)


def _check_layers(container: Container) -> None:
    count = int(container.require(f"{container.require('general.architecture')}.block_count"))
    missing = [layer for layer in range(count) if f"blk.{layer}.attn_output.weight" not in container.entries]
    if missing:
        raise CheckpointError(f"{container.path} lacks layer {missing[0]} of {count}: it holds no whole model")


def write_hf_folder(
    gguf_path: str | Path, out_dir: str | Path, dtype: str = "bfloat16", max_shard_bytes: int = DEFAULT_SHARD_BYTES
) -> Path:
    """Write the model as a Hugging Face folder, whole or not at all, with one tensor in memory at a time."""
    model, out = open_gguf(gguf_path), Path(out_dir)
    name = normalise_dtype(dtype)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out} exists and is not an empty folder: choose another one")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        _write_texts(model, partial, name)
        _write_shards(model, partial, name, max_shard_bytes)
        partial.chmod(0o755)  # mkdtemp's folders are for their owner alone
        partial.replace(out)
    finally:
        # Gone after the rename; left over only when something above was interrupted.
        shutil.rmtree(partial, ignore_errors=True)
    return out


def _write_texts(model: GgufModel, folder: Path, dtype: str) -> None:
    _write_json(folder / "config.json", model.config | {"dtype": dtype})
    _write_json(folder / "generation_config.json", model.generation_config)
    model.write_tokenizer(folder)


def _write_json(path: Path, fields: dict[str, Any]) -> None:
    path.write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_shards(model: GgufModel, folder: Path, dtype: str, max_shard_bytes: int) -> None:
    shards = _plan_shards(model, BYTES[dtype], max_shard_bytes)
    files: dict[str, str] = {}
    for number, tensors in enumerate(shards, start=1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(
            folder / file,
            {tensor.name: (SAFETENSORS_NAMES[dtype], tensor.shape) for tensor in tensors},
            (tensor.read(dtype) for tensor in tensors),
        )
        files |= {tensor.name: file for tensor in tensors}
    if len(shards) > 1:
        total = sum(int(np.prod(tensor.shape)) for tensor in model.tensors.values()) * BYTES[dtype]
        index = {"metadata": {"total_size": total}, "weight_map": files}
        _write_json(folder / "model.safetensors.index.json", index)


def _plan_shards(model: GgufModel, item_bytes: int, max_shard_bytes: int) -> list[list[GgufTensor]]:
    shards: list[list[GgufTensor]] = [[]]
    filled = 0
    for tensor in model.tensors.values():
        size = int(np.prod(tensor.shape)) * item_bytes
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += size
    return shards
