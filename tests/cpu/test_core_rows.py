"""Products of every count of rows, and what activations are rounded to, on every instruction set: test_core.py's definitions."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

from cpu import test_core as core
from lowbit.core import calls
from lowbit.formats import format_from_name


@pytest.fixture(params=core.every_instruction_set(), autouse=True)
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    calls.set_instruction_set(request.param)
    yield request.param
    calls.set_instruction_set(None)


@pytest.mark.parametrize("name", ["int4", "int8_asym", "int3_asym_g32_fp32", "nf4", "mxfp4"])
def test_products_of_every_count_of_rows_that_decodes_and_up_to_8192(name: str) -> None:
    """Every row of every count: a tail that is left out is one wrong row of thousands, which no norm over all would show."""
    packed, _ = core.quantized(name, 19, 72)
    buffer, weight = core.prepared(packed), packed.values()
    x = np.random.default_rng(6).standard_normal((8192, 72)).astype(np.float32)
    exact = x.astype(float) @ weight.T
    for rows in (*range(1, 34), 63, 511, 513, 8191, 8192):
        for compute, tolerance in (
            ("fp32", core.TOLERANCE_FP32),
            ("int8", core.TOLERANCE_INT8),
            ("auto", core.TOLERANCE_INT8),
        ):
            y = core.multiply(buffer, x[:rows], 19, compute)
            assert core.distance(y, exact[:rows]) < tolerance, (rows, compute)
            off = np.linalg.norm(y - exact[:rows], axis=1) / np.linalg.norm(weight)
            assert off.max() < 10 * tolerance, (rows, compute, int(off.argmax()))


def in_bytes(table: tuple[float, ...]) -> NDArray[np.float64]:
    """A table of levels as bytes hold it: exactly where all are whole multiples of the smallest, rounded elsewhere."""
    levels = np.asarray(table)
    sizes = np.abs(levels[np.isfinite(levels)])
    step = sizes[sizes > 0].min()
    if (sizes % step).any() or sizes.max() > 127 * step:
        step = sizes.max() / 127
    return np.rint(levels / step) * step


@pytest.mark.parametrize("name", [name for name in core.FORMATS if format_from_name(name).group_size > 0])
def test_activations_are_rounded_to_int8_by_default(name: str) -> None:
    """A scale for each group of a row, and a table of levels in bytes: what is left is the error of sums in fp32."""
    packed, _ = core.quantized(name, 19, 203)
    buffer, weight = core.prepared(packed), packed.values()
    x = np.random.default_rng(1).standard_normal((8, 203)).astype(np.float32)
    rounded = np.zeros(x.shape)
    for begin in range(0, 203, packed.format.group_size):
        part = x[:, begin : begin + packed.format.group_size].astype(float)
        step = np.abs(part).max(axis=1, keepdims=True) / 127
        rounded[:, begin : begin + packed.format.group_size] = np.rint(part / step) * step
    if packed.format.levels:
        scales = packed.float_scales()[:, np.arange(203) // packed.format.group_size]
        stored = scales * in_bytes(packed.format.levels)[core.read_stream(packed.codes, packed.format.bits, 203)]
    else:
        stored = weight
    for rows in (1, 8):
        by_default = core.multiply(buffer, x[:rows], 19, "auto")
        assert core.distance(by_default, rounded[:rows] @ stored.T) < core.TOLERANCE_FP32
        assert core.distance(by_default, x[:rows].astype(float) @ weight.T) > 100 * core.TOLERANCE_FP32
        assert np.array_equal(by_default, core.multiply(buffer, x[:rows], 19, "int8"))
