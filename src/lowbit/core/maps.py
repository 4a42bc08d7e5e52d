"""Mapped files that may be cut off while they are read.

A page that a file has lost is gone from every map of it, and the system ends who looks there (SIGBUS). The core looks after the
maps that it is told of: what is gone reads as zeros, and is remembered. `GuardedMap.check` says so with the file's name, and so
does every step of an engine over weights that lie there.
"""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np

from lowbit.core.library import check, library, library_path
from lowbit.errors import CheckpointError


class GuardedMap(mmap.mmap):
    """A whole file, mapped to be read. Arrays over it (`numpy.frombuffer`) keep it alive."""

    path: Path
    needed: int  # bytes that somebody reads
    _address: int = 0

    @classmethod
    def open(cls, path: Path) -> GuardedMap:
        with path.open("rb") as file:
            opened = cls(file.fileno(), 0, access=mmap.ACCESS_READ)
        opened.path, opened.needed = path, len(opened)
        # Readers of containers also work where the core was not built.
        if library_path() is not None:
            address = int(np.frombuffer(opened, np.uint8).ctypes.data)
            check(library().lowbit_guard_map(address, len(opened), bytes(path)))
            opened._address = address
        return opened

    def check(self) -> None:
        """Raise if the file was cut off since."""
        size = self.size()
        if size < self.needed or (self._address and library().lowbit_check_map(self._address)):
            raise CheckpointError(
                f"{self.path} was truncated to {size} bytes while it was in use: get it again, and load the model anew"
            )

    def __del__(self) -> None:
        # While the map is there: another may soon lie in its place.
        if self._address:
            library().lowbit_release_map(self._address)
