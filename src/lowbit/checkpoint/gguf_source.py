"""A GGUF file as the source of a transformers model: read tensor by tensor as the loader asks."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from lowbit.contents import gguf_in, is_gguf
from lowbit.errors import CheckpointError
from lowbit.interop.gguf import GgufModel, GgufTensor, open_gguf

_NAMES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


@dataclass(frozen=True)
class LazyTensor:
    """One tensor of a file, read when it is indexed: what transformers' loader takes in the place of a tensor."""

    tensor: GgufTensor
    dtype: torch.dtype

    @property
    def shape(self) -> torch.Size:
        return torch.Size(self.tensor.shape)

    def get_shape(self) -> list[int]:
        return list(self.tensor.shape)

    def __getitem__(self, index: Any) -> torch.Tensor:
        name = _NAMES[self.dtype]
        values = torch.from_numpy(self.tensor.read(name))
        return (values.view(torch.bfloat16) if self.dtype == torch.bfloat16 else values)[index]


def gguf_file(source: Path, named: str | None) -> Path | None:
    """The GGUF file that a source means: itself, the one named in it, or the only one in a folder without other weights."""
    if source.is_file() and is_gguf(source):
        return source
    if named is not None:
        if not (source / named).is_file():
            raise CheckpointError(f"{source} has no file {named}")
        return source / named
    return gguf_in(source) if source.is_dir() else None


def gguf_tokenizer(path: Path) -> Any:
    """The tokenizer that a GGUF file describes; transformers reads it from files, so it is put into some."""
    with tempfile.TemporaryDirectory(prefix="lowbit-") as folder:
        open_gguf(path).write_tokenizer(Path(folder))
        return transformers.AutoTokenizer.from_pretrained(folder)


def lazy_tensors(gguf: GgufModel, dtype: torch.dtype) -> dict[str, LazyTensor]:
    return {name: LazyTensor(tensor, dtype) for name, tensor in gguf.tensors.items()}
