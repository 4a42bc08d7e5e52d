"""A GGUF file as the engine needs it: the same face as `files.FolderFiles`.

Blocks that the core multiplies with are taken as they are; those of other types are read as numbers and rounded to the nearest
format, which `notes` says.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import cached_property
from pathlib import Path
from typing import Any

from lowbit.formats import Format, format_from_name
from lowbit.interop.gguf import GgufTensor, open_gguf
from lowbit.runtime.gguf_blocks import NEAREST, packed_blocks
from lowbit.runtime.mapped import release_pages
from lowbit.runtime.stored import DENSE_TYPES, Dense, Weight, quantize_dense
from lowbit.runtime.text import Tokenizer
from lowbit.search import PLAIN


class GgufFiles:
    """A GGUF file, or the first of a split series."""

    is_packed = False  # blocks can be read as numbers, so a recipe may round them anew
    formats: set[Format] = set()

    def __init__(self, path: Path) -> None:
        self.path = path
        self.notes: list[str] = []
        self.model = open_gguf(path)

    @property
    def names(self) -> Collection[str]:
        return self.model.tensors.keys()

    @cached_property
    def config(self) -> dict[str, Any]:
        return self.model.config

    @property
    def generation_config(self) -> dict[str, Any]:
        return self.model.generation_config

    def check(self) -> None:
        self.model.container.check()

    def tokenizer(self) -> Tokenizer:
        return Tokenizer.from_json(self.model.tokenizer_json(), self.model.tokenizer_config)

    def read(self, name: str, columns: int, is_embedding: bool = False) -> Weight:
        tensor = self.model.tensors[name]
        if tensor.type_name in DENSE_TYPES:
            return Dense(tensor.read(DENSE_TYPES[tensor.type_name]), DENSE_TYPES[tensor.type_name])
        if len(tensor.shape) < 2:
            return Dense(tensor.read("float32"), "float32")
        return self._read_blocks(tensor)

    def _read_blocks(self, tensor: GgufTensor) -> Weight:
        if tensor.change != "transpose":
            packed = packed_blocks(tensor.raw(), tensor.type_name, tensor.shape[-1])
            if packed is not None:
                return packed
        note = f"weights of type {tensor.type_name} are held as {NEAREST}: the engine has no product for them yet"
        if note not in self.notes:
            self.notes.append(note)
        return quantize_dense(Dense(tensor.read("float32"), "float32"), format_from_name(NEAREST), PLAIN)

    def release(self, name: str) -> None:
        release_pages(self.model.tensors[name].entry.data)
