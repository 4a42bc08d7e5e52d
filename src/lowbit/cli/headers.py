"""What lies in a checkpoint, read from its headers alone: no weight is loaded, and no torch is needed.

    .safetensors = length of the header, u64 | header, JSON {name: {dtype, shape, data_offsets}} | data
    .gguf        is read by `interop.gguf_container`, which maps the file

Every header is checked against the size of its file, so a download that was cut short is noticed here.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowbit.cli.source import missing
from lowbit.errors import CheckpointError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_LENGTH = struct.Struct("<Q")
_LONGEST_HEADER = 100_000_000  # the limit of the safetensors library itself
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file: its name, type and shape as stored, and where its bytes are."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    file: Path
    offset: int = 0

    def read(self) -> bytes:
        """The bytes of a (small) tensor."""
        with self.file.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.nbytes)


def read_folder(folder: Path) -> list[StoredTensor]:
    """Every tensor of a model folder, over all shards of its index."""
    index = folder / INDEX
    if index.is_file():
        return _read_shards(folder, _shards_of(index))
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(_no_weights(folder))
    return [tensor for file in files for tensor in read_safetensors(file)]


def _shards_of(index: Path) -> dict[str, str]:
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
        return {str(name): str(file) for name, file in content["weight_map"].items()}
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is no index of shards ({error!r}): copy the file again") from None


def _read_shards(folder: Path, weight_map: dict[str, str]) -> list[StoredTensor]:
    names = sorted(set(weight_map.values()))
    absent = [name for name in names if not (folder / name).is_file()]
    if absent:
        raise CheckpointError(
            f"{folder} lacks {len(absent)} of its {len(names)} files of weights ({absent[0]} ...): fetch them again"
        )
    tensors = [tensor for name in names for tensor in read_safetensors(folder / name)]
    lost = set(weight_map) - {tensor.name for tensor in tensors}
    if lost:
        raise CheckpointError(f"{folder}: its index names {len(lost)} tensors that no file holds, for one {min(lost)}")
    return tensors


def _no_weights(folder: Path) -> str:
    pickles = [file.name for pattern in _PICKLES for file in folder.glob(pattern)]
    if pickles:
        return (
            f"{folder} holds its weights as pickles ({pickles[0]}), which are not opened: convert them to safetensors"
        )
    return f"{folder} holds no weights: there is no .safetensors file in it"


def read_safetensors(path: Path) -> list[StoredTensor]:
    """The tensors of one file, from its header."""
    if not path.is_file():
        raise CheckpointError(missing(path))
    size = path.stat().st_size
    with path.open("rb") as file:
        first = file.read(_LENGTH.size)
        length = _LENGTH.unpack(first)[0] if len(first) == _LENGTH.size else 0
        if not 2 <= length <= _LONGEST_HEADER:
            raise CheckpointError(f"{path} is no safetensors file: its first 8 bytes are no length of a header")
        header = file.read(length)
    if len(header) < length:
        raise CheckpointError(f"{path} is truncated: it ends inside its header; fetch it again")
    tensors = _parse_header(path, header)
    end = max((tensor.offset + tensor.nbytes for tensor in tensors), default=0)
    if end > size:
        raise CheckpointError(
            f"{path} is truncated: it has {size} bytes, and its header speaks of {end}; fetch it again"
        )
    return tensors


def _parse_header(path: Path, header: bytes) -> list[StoredTensor]:
    start = _LENGTH.size + len(header)
    try:
        entries: dict[str, Any] = json.loads(header)
        entries.pop("__metadata__", None)
        return [
            StoredTensor(
                name=name,
                dtype=entry["dtype"],
                shape=tuple(entry["shape"]),
                nbytes=entry["data_offsets"][1] - entry["data_offsets"][0],
                file=path,
                offset=start + entry["data_offsets"][0],
            )
            for name, entry in entries.items()
        ]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise CheckpointError(f"{path} is damaged: its header cannot be read ({error!r}); fetch it again") from None


def read_gguf(path: Path) -> tuple[dict[str, Any], list[StoredTensor]]:
    """The metadata and the tensors of a GGUF file, with GGUF's names for both."""
    from lowbit.interop.gguf_container import read_container

    container = read_container(path)
    tensors = [StoredTensor(e.name, e.type.name, e.shape, e.data.nbytes, path) for e in container.entries.values()]
    return container.metadata, tensors
