"""Plain bf16 weights of a decoder, held exactly in 12 bits and a little.

A token reads every weight once, so a quarter fewer bytes is a third more tokens. The lower byte of a bf16 is noise, the upper one
(sign and exponent) takes few values in a trained weight: 4 bits name it in a table of 16 for each matrix, and the few weights with
another one are listed beside (csrc/tight.h). `loosen` gives the weight back bit for bit.

The layout is memory of its own, where a mapped file lies in pages that the system may take back, so it is made only while memory
allows it, and only where the instruction set decodes it without losing what the bytes give.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowbit.core.arena import Memory, shorten, weight_memory
from lowbit.core.library import check, last_error
from lowbit.errors import WeightError
from lowbit.machine import available_memory
from lowbit.runtime.abi import TIGHT, UNSUPPORTED, engine_library
from lowbit.runtime.weights import Matrix, sample_of

# Memory that is left to the cache, to the buffers of a step and to everybody else.
_SPARE = 1 << 30


def tight_pays() -> bool:
    """Whether decoding is faster with tight weights on the instruction set in use."""
    return bool(engine_library().lowbit_tight_pays())


def tighten(weight: NDArray[np.uint16]) -> Matrix | None:
    """A bf16 weight [out, in] or [experts, out, in], given as its bits, laid out tightly; None where that saves nothing."""
    core, array = engine_library(), np.ascontiguousarray(weight)
    rows, cols = array.shape[-2:]
    experts = array.reshape(-1, rows, cols)
    room = int(core.lowbit_tight_bytes(rows, cols))
    if not 0 < room < array.nbytes // len(experts):
        return None
    memory, used = weight_memory(room * len(experts)), ctypes.c_int64()
    place = int(memory.ctypes.data)
    for index, expert in enumerate(experts):
        status = core.lowbit_tighten(expert.ctypes.data, rows, cols, place + index * room, room, used)
        if status == UNSUPPORTED:
            shorten(memory, 0)
            return None
        check(status)
    size = used.value if len(experts) == 1 else room
    memory = shorten(memory, size * len(experts))
    return Matrix(place, rows, cols, TIGHT, "bfloat16", len(experts), size, None, memory, sample_of(_bytes(array)))


def loosen(matrix: Matrix) -> NDArray[np.uint16]:
    """The weight that `tighten` laid out, [count, out, in]."""
    weight = np.empty((matrix.count, matrix.rows, matrix.cols), np.uint16)
    for index in range(matrix.count):
        status = engine_library().lowbit_loosen(
            matrix.address + index * matrix.bytes, matrix.bytes, weight[index].ctypes.data
        )
        if status:
            raise WeightError(last_error())
    return weight


def _bytes(array: NDArray[Any]) -> Memory:
    return array.reshape(-1).view(np.uint8)


@dataclass
class Tightening:
    """The tight weights of a model while it loads, and what is to be said of them."""

    wanted: bool = True
    available: Callable[[], int | None] = available_memory
    count: int = 0
    plain_bytes: int = 0
    tight_bytes: int = 0
    short: int = 0

    def __post_init__(self) -> None:
        self.wanted = self.wanted and tight_pays()

    def add(self, weight: NDArray[np.uint16]) -> Matrix | None:
        """The tight form of a weight; None where it stays as it is."""
        if not self.wanted:
            return None
        available = self.available()
        if available is not None and available < _SPARE + weight.nbytes:
            self.short += 1
            return None
        matrix = tighten(weight)
        if matrix is not None:
            self.count += 1
            self.plain_bytes += weight.nbytes
            self.tight_bytes += matrix.count * matrix.bytes
        return matrix

    @property
    def notes(self) -> list[str]:
        found = []
        if self.count:
            bits = 16 * self.tight_bytes / self.plain_bytes
            found.append(
                f"{self.count} bf16 weights are held exactly in {bits:.1f} bits: {self.tight_bytes / 1e6:,.0f} MB in memory "
                f"instead of {self.plain_bytes / 1e6:,.0f} MB read from the file"
            )
        if self.short:
            found.append(
                f"{self.short} bf16 weights are read from the mapped file: there is too little memory to hold them in 12 bits"
            )
        return found
