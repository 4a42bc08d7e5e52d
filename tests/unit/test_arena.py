"""Memory of prepared weights: aligned, apart, and given back."""

import gc
import weakref

import numpy as np

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
