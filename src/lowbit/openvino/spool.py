"""Memory that is a file: as large as the disk, and given back as soon as nobody looks.

    spool = Spool(nameless(folder))     a file that is gone with its process
    view = spool.keep(array)            the same numbers, in clean pages of the file
    view, begin = spool.place(array)    and where they begin there

    kept = Kept(folder)
    for loaded in kept.passing(read_weights(...)): ...       weights go by, and packed ones stay in a spool
    for loaded in kept: ...                                  the same once more, one at a time

`Kept` is what an export compares its result with: the codes as the rounding gave them, before they became anything of OpenVINO's.
Rounding a plain model a second time costs as much as the export.
"""

from __future__ import annotations

import dataclasses
import mmap
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from lowbit.packing import PackedTensor
from lowbit.runtime.files import Loaded
from lowbit.runtime.mapped import mapped_bytes, release_pages
from lowbit.runtime.stored import Dense, Weight

# Smaller arrays stay in memory: a map of its own would cost more than they are.
_SMALL = 1 << 16
# A map keeps a handle of its file open, of which a process often has 1024: many arrays share one, and maps grow with the file.
_STRETCH, _PART = 1 << 28, 16
# What is appended begins at a multiple of so many bytes: no number lies across two lines of a cache.
_APART = 64


def nameless(folder: Path) -> IO[bytes]:
    """A file without a name."""
    return tempfile.TemporaryFile(dir=folder)  # the caller's, to close


class Spool:
    """Arrays in one file, which is the spool's from here on."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._begin = self._end = 0
        self._map: mmap.mmap | None = None

    def keep(self, array: NDArray[Any]) -> NDArray[Any]:
        """A copy of an array in the file; of a small one, in memory."""
        return owned(array) if array.nbytes < _SMALL else self.place(array)[0]

    def place(self, array: NDArray[Any]) -> tuple[NDArray[Any], int]:
        """A copy of an array in the file, and where it begins there."""
        array = np.ascontiguousarray(array)
        start = -(-self._end // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        if self._map is None or start + array.nbytes > self._begin + len(self._map):
            size = max(array.nbytes, _STRETCH, self._end // _PART)
            self._file.truncate(start + size)
            self._map = mmap.mmap(self._file.fileno(), size, access=mmap.ACCESS_COPY, offset=start)
            self._begin = start
        self._file.seek(start)
        self._file.write(array.reshape(-1).view(np.uint8).data)
        self._file.flush()
        self._end = start + array.nbytes
        return np.frombuffer(self._map, array.dtype, array.size, start - self._begin).reshape(array.shape), start

    def append(self, data: bytes) -> int:
        """Put bytes behind what is there, and say where they begin; nobody maps them."""
        start = -(-self._end // _APART) * _APART
        self._file.seek(start)
        self._file.write(data)
        self._end = start + len(data)
        return start

    def cut(self) -> None:
        """End the file where what it holds ends: maps reach further than that."""
        self._file.flush()
        self._file.truncate(self._end)

    def close(self) -> None:
        """Let go of the file; arrays in it stay as long as somebody has them."""
        self._file.close()
        self._map = None


def owned(array: NDArray[Any]) -> NDArray[Any]:
    """The array, or a copy where its memory is somebody else's."""
    return array.copy() if array.base is not None or not array.flags.owndata else array


class Kept:
    """The weights of a model as they went by."""

    def __init__(self, folder: Path) -> None:
        self._spool = Spool(nameless(folder))
        self._loaded: list[Loaded] = []

    def passing(self, weights: Iterable[Loaded]) -> Iterator[Loaded]:
        """The weights as they come. Those that lie in a mapped file stay there."""
        for loaded in weights:
            self._loaded.append(dataclasses.replace(loaded, weight=self._keep(loaded.weight)))
            yield loaded
        self._spool.close()

    def _keep(self, weight: Weight) -> Weight:
        if isinstance(weight, Dense):
            mapped = mapped_bytes(weight.array)
            return weight if mapped else Dense(self._spool.keep(weight.array), weight.dtype)
        return weight.with_tensors({name: self._spool.keep(array) for name, array in weight.tensors().items()})

    def __iter__(self) -> Iterator[Loaded]:
        for loaded in self._loaded:
            yield loaded
            if isinstance(loaded.weight, PackedTensor):
                for array in loaded.weight.tensors().values():
                    if mapped_bytes(array):
                        release_pages(array)
