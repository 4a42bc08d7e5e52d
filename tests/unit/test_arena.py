"""Memory of prepared weights: aligned, apart, and given back."""

import ctypes
import gc
import subprocess
import sys
import weakref

import numpy as np
import pytest

from lowbit.core import arena


def test_pieces_are_aligned_and_apart() -> None:
    sizes = [1, 63, 64, 100_000, 3 << 20, 20 << 20]
    pieces = [arena.weight_memory(size) for size in sizes]
    for number, piece in enumerate(pieces):
        piece[:] = number
    for number, (size, piece) in enumerate(zip(sizes, pieces, strict=True)):
        assert piece.size == size
        assert piece.ctypes.data % arena.ALIGNMENT == 0
        assert (piece == number).all()


def test_more_than_a_chunk_begins_another() -> None:
    size = 10 << 20
    pieces = [arena.weight_memory(size) for _ in range(8)]
    addresses = sorted(piece.ctypes.data for piece in pieces)
    assert (np.diff(addresses) >= size).all()


def test_memory_goes_back_with_its_weight() -> None:
    piece = arena.weight_memory(20 << 20)
    owner = weakref.ref(piece.base)
    assert owner() is not None
    del piece
    gc.collect()
    assert owner() is None


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="only glibc has malloc_trim"
)
def test_what_the_c_library_keeps_goes_back() -> None:
    """Weights leave the memory that they were read into, and others must not have to take more."""
    program = """
import resource
import numpy as np
from lowbit.core import arena

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

del (first := [np.ones(1 << 20, np.uint8)])[0]  # blocks of this size come from the heap from now on
pieces = [np.ones(1 << 20, np.uint8) for _ in range(128)]
last = np.ones(1 << 20, np.uint8)  # keeps the end of the heap where it is
pieces.clear()
before = resident()
piece = arena.weight_memory(20 << 20)
print(before - resident() >> 20)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 100
