"""Safetensors files as views of the mapped file, in numpy.

`contents.read_header` says where each tensor lies. The safetensors package maps a file too, but through numpy it knows
no bfloat16 and no 8-bit floats, and copies each tensor. Here a tensor is a view (bfloat16 as its bits), and pages that
have been read are given back one tensor at a time: they are clean copies of the file, so the resident memory while a
model loads is what has been made of it and one weight.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowbit.contents import read_header
from lowbit.core.maps import GuardedMap
from lowbit.errors import CheckpointError

# safetensors' name of an element type -> numpy's; bfloat16 comes as its bits.
DTYPES: dict[str, str] = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1",
    "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1", "BOOL": "?",
}  # fmt: skip


@dataclass(frozen=True)
class Tensor:
    """One tensor of a file: where its bytes lie in the map."""

    file: MappedFile
    dtype: str
    shape: tuple[int, ...]
    begin: int

    def view(self) -> NDArray[Any]:
        """The numbers, as a view of the file."""
        if self.dtype not in DTYPES:
            raise CheckpointError(f"{self.file.path} holds weights of type {self.dtype}, which the engine cannot read")
        flat = np.frombuffer(self.file.map, DTYPES[self.dtype], self.count, self.begin)
        return flat.reshape(self.shape)

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def end(self) -> int:
        return self.begin + self.count * np.dtype(DTYPES[self.dtype]).itemsize if self.dtype in DTYPES else 0

    def release(self) -> None:
        """Give the pages of this tensor back."""
        release_pages(self.view())


class MappedFile:
    """A safetensors file, mapped. Its header was checked against its size."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors = {
            stored.name: Tensor(self, stored.dtype, stored.shape, stored.offset) for stored in read_header(path)
        }
        self.map = GuardedMap.open(path)
        self.map.needed = max((tensor.end for tensor in self.tensors.values()), default=0)
        self.check()

    def check(self) -> None:
        """Raise if somebody has cut the file off since."""
        self.map.check()


def mapped_bytes(array: NDArray[Any]) -> int:
    """Bytes of an array that is a view of a mapped file; 0 for any other memory, whose pages must not be given back."""
    base: Any = array
    while isinstance(base, np.ndarray):
        base = base.base
    if isinstance(base, memoryview):
        base = base.obj
    return array.nbytes if isinstance(base, mmap.mmap) else 0


def release_pages(array: NDArray[Any]) -> None:
    """Give back the pages that lie wholly inside an array over a mapped file; they are read again if somebody looks."""
    if sys.platform != "linux" or not array.size:
        return
    begin, page = int(array.ctypes.data), mmap.PAGESIZE
    first, last = -(-begin // page) * page, (begin + array.nbytes) // page * page
    if last > first:
        _system().madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_DONTNEED)


@lru_cache(maxsize=1)
def _system() -> ctypes.CDLL:
    """The C library; looking it up costs more than a call."""
    return ctypes.CDLL(None)
