"""Memory for prepared weights, in huge pages where the system has them.

A token reads every weight once, front to back. In pages of 4 KiB the processor looks up an address 512 times for what one page of
2 MiB holds, and under a hypervisor each look-up is a walk through two tables: the 1.1 B decodes 6 to 10% slower so. Single weights
are smaller than a huge page, so they lie one behind another in chunks. A chunk goes back when the last weight in it does.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import threading
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Memory = NDArray[np.uint8]
ALIGNMENT = 64  # bytes; what the wide loads of the products ask for
_HUGE_PAGE = 2 << 20
_CHUNK = 32 << 20


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


class _Arena:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._chunk: Memory = np.empty(0, np.uint8)
        self._used = 0

    def take(self, size: int) -> Memory:
        with self._lock:
            if self._used + size > self._chunk.size:
                self._chunk, self._used = _map(_CHUNK), 0
            start = self._used
            self._used += _aligned(size)
            return self._chunk[start : start + size]

    def shorten(self, memory: Memory, size: int) -> None:
        with self._lock:
            end = int(self._chunk.ctypes.data) + self._used
            if memory.size and int(memory.ctypes.data) + _aligned(memory.size) == end:
                self._used -= _aligned(memory.size) - _aligned(size)


_ARENA = _Arena()


def weight_memory(size: int) -> Memory:
    """`size` bytes on a boundary of 64, not initialised."""
    return _map(size) if size > _CHUNK // 2 else _ARENA.take(size)


def shorten(memory: Memory, size: int) -> Memory:
    """The first `size` bytes of what was taken; the rest is taken again by who asks next."""
    _ARENA.shorten(memory, size)
    return memory[:size]


def _map(size: int) -> Memory:
    """Fresh memory that begins at a huge page and asks to lie in such."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        whole = np.empty(size + ALIGNMENT, np.uint8)
        start = -whole.ctypes.data % ALIGNMENT
        return whole[start : start + size]
    _give_back_free_memory()
    mapped = mmap.mmap(-1, size + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them: ordinary pages serve
        mapped.madvise(mmap.MADV_HUGEPAGE)
    whole = np.frombuffer(mapped, np.uint8)
    start = -whole.ctypes.data % _HUGE_PAGE
    return whole[start : start + size]


def _give_back_free_memory() -> None:
    """What a weight lay in before it came here is free now, but the C library keeps it: 700 MB of the 1.1 B."""
    trim = _trim()
    if trim is not None:
        trim(0)


@lru_cache(maxsize=1)
def _trim() -> Any:
    """glibc's malloc_trim; None where there is another C library."""
    return getattr(ctypes.CDLL(None), "malloc_trim", None)
