"""Weights with more than a scale per group, on every instruction set: scales that are quantised themselves, and GGUF's blocks.

    _dq                  w = ((s - 128) * step[i // block] + offset) * (code - zero), or times levels[code]; i counts all scales
    k-quants, q4_1, ..   as the gguf package reads them

The counterpart of test_core.py, whose weights have plain scales. Cells of every shape: whole blocks of 16 rows and parts of
one, rows of many GGUF blocks, groups that do not divide a row, blocks of scales that cross rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

from cpu import test_core as core
from cpu.gguf_rows import random_rows
from lowbit.core import calls
from lowbit.formats import Format, format_from_name

ROWS = (1, 8, 17, 64)
DOUBLE = ["int2_g16_dq", "int3_asym_g32_dq", "int4_dq", "int4_asym_dq", "int4_g24_dq", "int4_channel_dq"]
DOUBLE += ["int4_fine_dq", "int3_fine_g32_dq"]
DOUBLE += ["int6_dq", "int8_asym_dq", "nf4_dq", "nf3_dq", "fp4_dq", "fp6_dq"]
DOUBLE_SHAPES = [(37, 203), (16, 576), (131, 96)]
BLOCKS = ["q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "q4_1", "q5_1"]
BLOCK_SHAPES = [(37, 256), (48, 1024), (3, 512)]


@pytest.fixture(params=core.every_instruction_set(), autouse=True)
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    calls.set_instruction_set(request.param)
    yield request.param
    calls.set_instruction_set(None)


@dataclass
class Stored:
    """Canonical buffers by name, and the weight that they stand for."""

    format: Format
    shape: tuple[int, int]
    buffers: dict[str, NDArray[np.generic]]
    weight: NDArray[np.float64]

    def addresses(self) -> calls.Canonical:
        return calls.Canonical.of({name: array.ctypes.data for name, array in self.buffers.items()})

    def prepared(self) -> NDArray[np.uint8]:
        buffer = core.aligned(calls.prepared_bytes(self.format, *self.shape))
        calls.prepare(self.format, *self.shape, self.addresses(), buffer.ctypes.data, buffer.size)
        return buffer


def double_quantized(name: str, rows: int, cols: int) -> Stored:
    """Random codes on both levels."""
    format, random = format_from_name(name), np.random.default_rng(rows)
    groups = format.groups(cols)
    codes = random.integers(0, 1 << format.bits, (rows, cols)).astype(np.uint8)
    words = np.zeros((rows, format.code_words(cols)), np.int32)
    calls.pack(format.bits, rows, cols, codes.ctypes.data, words.ctypes.data)
    scales = random.integers(0, 256, (rows, groups)).astype(np.uint8)
    steps = random.uniform(0.5, 1.5, -(-rows * groups // format.scale_block)).astype(np.float32)
    offset = np.full(1, 30.0, np.float32)
    zeros = random.integers(0, int(format.max_zero / format.zero_step) + 1, (rows, groups)).astype(np.uint8)
    index = np.arange(rows * groups).reshape(rows, groups) // format.scale_block
    group = np.arange(cols) // (format.group_size if format.group_size > 0 else cols)
    scale = ((scales.astype(float) - 128) * steps[index] + offset)[:, group]
    middle = format.midpoint if format.symmetric else zeros[:, group] * format.zero_step
    level = np.asarray(format.levels)[codes] if format.levels else codes.astype(float) - middle
    buffers = {"codes": words, "scales": scales, "scale_scales": steps, "scale_offset": offset}
    if not format.symmetric:
        buffers["zeros"] = zeros
    return Stored(format, (rows, cols), buffers, scale * level)


def of_blocks(name: str, rows: int, cols: int) -> Stored:
    data = random_rows(name.upper(), rows, cols)
    weight = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[name.upper()]).reshape(rows, cols)
    return Stored(format_from_name(name), (rows, cols), {"codes": data}, weight.astype(float))


STORED = [(name, shape) for name in DOUBLE for shape in DOUBLE_SHAPES]
STORED += [(name, shape) for name in BLOCKS for shape in BLOCK_SHAPES]


@pytest.fixture(params=STORED, ids=lambda case: f"{case[0]}-{case[1][0]}x{case[1][1]}")
def stored(request: pytest.FixtureRequest) -> Stored:
    name, shape = request.param
    return (of_blocks if name in BLOCKS else double_quantized)(name, *shape)


def test_prepared_weights_are_read_and_restored(stored: Stored) -> None:
    rows, cols = stored.shape
    dense = np.zeros(stored.shape, np.float32)
    calls.dequantize(stored.format, stored.addresses(), core.matrix(dense))
    assert np.allclose(dense, stored.weight, rtol=1e-6, atol=1e-6 * np.abs(stored.weight).max())
    buffer = stored.prepared()
    wanted, read = np.array([rows - 1, 0, rows // 2]), np.zeros((3, cols), np.float32)
    calls.read_rows(buffer.ctypes.data, buffer.size, wanted.ctypes.data, 3, read.ctypes.data)
    assert np.array_equal(read, dense[wanted])
    back = Stored(stored.format, stored.shape, {n: np.zeros_like(a) for n, a in stored.buffers.items()}, stored.weight)
    calls.restore(buffer.ctypes.data, buffer.size, back.addresses())
    for name, array in stored.buffers.items():
        assert np.array_equal(back.buffers[name], array), name


def test_products(stored: Stored) -> None:
    rows, cols = stored.shape
    buffer = stored.prepared()
    bias = np.random.default_rng(2).standard_normal(rows).astype(np.float32)
    for tokens in ROWS:
        x = np.random.default_rng(tokens).standard_normal((tokens, cols)).astype(np.float32)
        exact = x.astype(float) @ stored.weight.T
        size = float(np.abs(exact).mean())
        bias_ = (bias * size).astype(np.float32)
        for compute, tolerance in (("fp32", core.TOLERANCE_FP32), ("auto", core.TOLERANCE_INT8)):
            found = core.multiply(buffer, x, rows, compute, bias_)
            assert core.distance(found, exact + bias_) < tolerance, (compute, tokens)
