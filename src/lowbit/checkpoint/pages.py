"""Give back the memory of a checkpoint that has been read.

safetensors maps its files into memory. Pages that were read count as the process's own until they are unmapped, which transformers
does when all is loaded: by then a 2.2 GB checkpoint weighs 2.2 GB beside its packed copy. Pages that nobody wrote to are copies of
the file, so the kernel may take them back at any time (`madvise` with MADV_DONTNEED) and reads them again if somebody asks.

A page that was written to would lose what was written. So only mappings that this load made are given back (an older model over the
same file may have been trained in place), and only while weights are packed: kernels bring weights into their form in place. Linux
only; elsewhere nothing happens and loading takes the more memory.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

_DONT_NEED = 4
# Giving back takes a look at the process's mappings, so it waits until this much has been read.
_STEP_BYTES = 128 << 20


class Pages:
    """The pages that one load maps of some files."""

    def __init__(self, files: Iterable[str]) -> None:
        self.files = list(files)
        self.older = set(self._mappings())
        self.read_since = 0

    def was_read(self, nbytes: int) -> None:
        """Count what was read, and give it back when it is enough to be worth it."""
        self.read_since += nbytes
        if self.read_since >= _STEP_BYTES:
            self.release()

    def release(self) -> None:
        """Give back every page that was read."""
        self.read_since = 0
        fresh = set(self._mappings()) - self.older
        libc = ctypes.CDLL(None) if fresh else None
        for start, end in fresh:
            assert libc is not None
            libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _DONT_NEED)

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor lies in what this load mapped, so that its numbers are read when they are used."""
        if tensor.device.type != "cpu":
            return False
        return any(start <= tensor.data_ptr() < end for start, end in set(self._mappings()) - self.older)

    def _mappings(self) -> Iterator[tuple[int, int]]:
        """The address ranges that the files are mapped to."""
        if sys.platform != "linux" or not self.files:
            return
        files = {str(Path(file).resolve()) for file in self.files}  # of the hub's, some may have come only now
        for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
            # address-range permissions offset device inode path
            fields = line.split(maxsplit=5)
            if len(fields) == 6 and fields[5] in files:
                start, end = (int(part, 16) for part in fields[0].split("-"))
                yield start, end
