"""Safetensors files as views of the mapped file, in numpy.

    file = header length u64 | header JSON {name: {dtype, shape, data_offsets}} | the tensors' bytes

The safetensors package maps a file too, but through numpy it knows no bfloat16 and no 8-bit floats, and copies each
tensor. Here a tensor is a view (bfloat16 as its bits), and pages that have been read are given back one tensor at a
time: they are clean copies of the file, so the resident memory while a model loads is what has been made of it and
one weight.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import struct
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowbit.errors import CheckpointError

# safetensors' name of an element type -> numpy's; bfloat16 comes as its bits.
DTYPES: dict[str, str] = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1",
    "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1", "BOOL": "?",
}  # fmt: skip
_LENGTH_BYTES = 8


@dataclass(frozen=True)
class Tensor:
    """One tensor of a file: where its bytes lie in the map."""

    file: MappedFile
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    def view(self) -> NDArray[Any]:
        """The numbers, as a view of the file."""
        if self.dtype not in DTYPES:
            raise CheckpointError(f"{self.file.path} holds weights of type {self.dtype}, which the engine cannot read")
        flat = np.frombuffer(self.file.map, DTYPES[self.dtype], self.count, self.begin)
        return flat.reshape(self.shape)

    @property
    def count(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    def release(self) -> None:
        """Give the pages of this tensor back."""
        release_pages(self.view())


class MappedFile:
    """A safetensors file, mapped. Its header was checked against its size."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                size = path.stat().st_size
                prefix = file.read(_LENGTH_BYTES)
                length = struct.unpack("<Q", prefix)[0] if len(prefix) == _LENGTH_BYTES else size
                if _LENGTH_BYTES + length > size:
                    raise CheckpointError(
                        f"{path} is truncated or no safetensors file: it has {size} bytes and no whole header"
                    )
                header = json.loads(file.read(length))
                self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError:
            raise CheckpointError(f"{path} is missing, although the folder's index names it: get it again") from None
        except (UnicodeDecodeError, json.JSONDecodeError):
            raise CheckpointError(f"{path} is no safetensors file: its header cannot be read") from None
        start = _LENGTH_BYTES + length
        self.tensors = {
            name: self._tensor(name, entry, start, size) for name, entry in header.items() if name != "__metadata__"
        }

    def _tensor(self, name: str, entry: dict[str, Any], start: int, size: int) -> Tensor:
        begin, end = (start + offset for offset in entry["data_offsets"])
        tensor = Tensor(self, entry["dtype"], tuple(entry["shape"]), begin, end)
        if end > size:
            raise CheckpointError(
                f"{self.path} is truncated: it should have at least {end} bytes and has {size}; get it again"
            )
        if tensor.dtype in DTYPES and tensor.count * np.dtype(DTYPES[tensor.dtype]).itemsize != end - begin:
            raise CheckpointError(
                f"{self.path} is damaged: {name} has {end - begin} bytes, which is not {list(tensor.shape)} {tensor.dtype}"
            )
        return tensor


def release_pages(array: NDArray[Any]) -> None:
    """Give back the pages that lie wholly inside an array over a mapped file; they are read again if somebody looks."""
    if sys.platform != "linux" or not array.size:
        return
    begin, page = int(array.ctypes.data), mmap.PAGESIZE
    first, last = -(-begin // page) * page, (begin + array.nbytes) // page * page
    if last > first:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_DONTNEED)
