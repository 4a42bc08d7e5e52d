"""The compiled core against a definition in numpy, on every instruction set that this processor has. No torch.

The numpy side is written from the canonical form alone: w = scale * (code - zero) or scale * levels[code], codes as a dense
bit stream, and products as plain matrix products in double precision.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

from lowbit.core import calls, library
from lowbit.errors import KernelError, WeightError
from lowbit.formats import Format, format_from_name

ROWS = (1, 2, 8, 16, 17, 31, 33, 256)
SHAPES = [(1, 1), (37, 203), (16, 576), (48, 131)]
FORMATS = [
    "int2",
    "int3_asym_g32_fp32",
    "int4",
    "int4_asym",
    "int4_fine",
    "int2_fine_g16",
    "int3_fine_g24_fp32",
    "int5_fine_channel",
    "int4_g16",
    "int4_g24",
    "int4_channel",
    "int5_fp32",
    "int6_asym_channel",
]
FORMATS += ["int7_g20", "int8", "int8_asym", "nf4", "nf3", "fp4", "fp4_e2m1", "fp6", "fp6_e3m2", "fp8_e4m3", "fp8_e5m2"]
FORMATS += ["mxfp4", "nvfp4"]
SCALE_DTYPES = {"float16": np.float16, "float32": np.float32, "e8m0": np.uint8, "e4m3": np.uint8}
TOLERANCE_FP32 = 2e-6
TOLERANCE_INT8 = 0.02


def sets_here(names: Iterable[str]) -> list[str]:
    """Those of some instruction sets that run on this processor, and that the system lends."""
    found = []
    for name in names:
        try:
            calls.set_instruction_set(name)
        except KernelError:
            continue
        found.append(name)
    calls.set_instruction_set(None)
    return found


def instruction_sets() -> list[str]:
    return sets_here(("amx", "avx512", "avx_vnni", "avx2", "neon_i8mm", "neon", "portable"))


def every_instruction_set() -> list[str]:
    """Those of this processor, and the stand-in for tile registers, which any processor has."""
    return [*instruction_sets(), "amx_emulated"]


@pytest.fixture(params=every_instruction_set(), autouse=True)
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    calls.set_instruction_set(request.param)
    yield request.param
    calls.set_instruction_set(None)


class Packed:
    """A canonical weight in numpy arrays."""

    def __init__(self, format: Format, rows: int, cols: int) -> None:
        self.format, self.rows, self.cols = format, rows, cols
        groups = format.groups(cols)
        self.codes = np.full((rows, format.code_words(cols)), -1, np.int32)
        self.scales = np.zeros((rows, groups), SCALE_DTYPES[format.scale_dtype])
        self.zeros = np.zeros((rows, groups), np.uint8)
        self.unit = np.ones(1, np.float32)

    def addresses(self) -> calls.Canonical:
        return calls.Canonical(
            self.codes.ctypes.data, self.scales.ctypes.data, self.zeros.ctypes.data, self.unit.ctypes.data
        )

    def values(self) -> NDArray[np.float64]:
        """The weight by definition."""
        codes = read_stream(self.codes, self.format.bits, self.cols)
        group = np.arange(self.cols) // (self.format.group_size if self.format.group_size > 0 else self.cols)
        scales = self.float_scales()[:, group]
        if self.format.levels:
            return scales * np.asarray(self.format.levels)[codes]
        if self.format.symmetric:
            return scales * (codes.astype(int) - self.format.midpoint)
        return scales * (codes - self.zeros[:, group] * self.format.zero_step)

    def float_scales(self) -> NDArray[np.float64]:
        if self.format.scale_dtype == "e8m0":
            return np.exp2(self.scales.astype(float) - 127)
        if self.format.scale_dtype == "e4m3":
            return np.asarray(format_from_name("fp8_e4m3").levels)[self.scales] * float(self.unit[0])
        return self.scales.astype(float)


def read_stream(words: NDArray[np.int32], bits: int, count: int) -> NDArray[np.int64]:
    """Element i of a row at bits [i * bits, (i + 1) * bits), least significant first."""
    stream = np.unpackbits(words.view(np.uint8).reshape(words.shape[0], -1), axis=1, bitorder="little")[
        :, : count * bits
    ]
    return stream.reshape(words.shape[0], count, bits).astype(np.int64) @ (1 << np.arange(bits))


def quantized(name: str, rows: int, cols: int, seed: int = 0) -> tuple[Packed, NDArray[np.float32]]:
    weight = np.random.default_rng(seed).standard_normal((rows, cols)).astype(np.float32)
    packed = Packed(format_from_name(name), rows, cols)
    calls.quantize(packed.format, matrix(weight), packed.addresses())
    return packed, weight


def matrix(array: NDArray[np.float32]) -> calls.Rows:
    return calls.Rows(array.ctypes.data, str(array.dtype), *array.shape, stride=array.strides[0] // array.itemsize)


def aligned(size: int) -> NDArray[np.uint8]:
    room = np.empty(size + 64, np.uint8)
    begin = -room.ctypes.data % 64
    return room[begin : begin + size]


def prepared(packed: Packed) -> NDArray[np.uint8]:
    buffer = aligned(calls.prepared_bytes(packed.format, packed.rows, packed.cols))
    calls.prepare(packed.format, packed.rows, packed.cols, packed.addresses(), buffer.ctypes.data, buffer.size)
    return buffer


def multiply(
    buffer: NDArray[np.uint8],
    x: NDArray[np.float32],
    outputs: int,
    compute: str,
    bias: NDArray[np.float32] | None = None,
) -> NDArray[np.float32]:
    y = np.full((len(x), outputs), np.nan, x.dtype)
    calls.run(
        buffer.ctypes.data, buffer.size, matrix(x), matrix(y), bias.ctypes.data if bias is not None else 0, compute
    )
    return y


def distance(y: NDArray[np.float32], exact: NDArray[np.float64]) -> float:
    return float(np.linalg.norm(y - exact) / np.linalg.norm(exact))


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("cols", [1, 7, 31, 32, 33, 203])
def test_pack_writes_the_stream_and_unpack_reads_it(bits: int, cols: int) -> None:
    values = np.random.default_rng(bits).integers(0, 1 << bits, (5, cols)).astype(np.uint8)
    words = np.full((5, -(-cols * bits // 32)), -1, np.int32)
    calls.pack(bits, 5, cols, values.ctypes.data, words.ctypes.data)
    assert np.array_equal(read_stream(words, bits, cols), values)
    back = np.zeros_like(values)
    calls.unpack(bits, 5, cols, words.ctypes.data, back.ctypes.data)
    assert np.array_equal(back, values)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_quantized_weights_are_the_nearest_on_their_grid(name: str, shape: tuple[int, int]) -> None:
    packed, weight = quantized(name, *shape)
    codes = read_stream(packed.codes, packed.format.bits, packed.cols)
    near = np.abs(packed.values() - weight)
    levels = len(packed.format.levels) or packed.format.max_code + 1
    for step in (-1, 1):  # for the codebooks in the order of their values
        order = np.argsort(packed.format.levels, kind="stable") if packed.format.levels else np.arange(levels)
        order = order[: np.isfinite(np.asarray(packed.format.levels or [0.0] * levels)[order]).sum()]
        place = np.argsort(order)[codes] if len(order) == levels else np.searchsorted(order, codes)
        if packed.format.levels and len(order) != levels:
            continue  # levels that are no numbers leave holes in the order
        moved = order[np.clip(place + step, 0, len(order) - 1)]
        other = Packed(packed.format, packed.rows, packed.cols)
        other.scales, other.zeros, other.unit = packed.scales, packed.zeros, packed.unit
        calls.pack(
            packed.format.bits, packed.rows, packed.cols, moved.astype(np.uint8).ctypes.data, other.codes.ctypes.data
        )
        assert (near <= np.abs(other.values() - weight) + 1e-6).all()


def test_largest_weight_of_a_symmetric_group_maps_to_code_zero() -> None:
    packed, weight = quantized("int4_g32_fp32", 9, 128)
    codes = read_stream(packed.codes, 4, 128).reshape(9, 4, 32)
    largest = np.abs(weight.reshape(9, 4, 32)).argmax(-1)
    assert (np.take_along_axis(codes, largest[..., None], -1) == 0).all()


@pytest.mark.parametrize("name", ["int4", "int3_asym_g32_fp32", "int2", "nf4", "mxfp4"])
@pytest.mark.parametrize("weighed", [False, True])
def test_searched_scales_are_never_worse(name: str, weighed: bool) -> None:
    plain, weight = quantized(name, 33, 203, seed=3)
    importance = np.random.default_rng(4).random(203).astype(np.float32) if weighed else np.ones(203, np.float32)
    searched = Packed(plain.format, 33, 203)
    ratios = [0.7 + 0.01 * i for i in range(41)]
    address = importance.ctypes.data if weighed else 0
    calls.quantize(plain.format, matrix(weight), searched.addresses(), ratios, 1, address)
    error = [(importance * (p.values() - weight) ** 2).sum() for p in (plain, searched)]
    assert error[1] <= error[0] if name == "mxfp4" else error[1] < error[0]  # powers of two leave little to find


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_dequantize_gives_the_definition(name: str, shape: tuple[int, int]) -> None:
    packed, _ = quantized(name, *shape)
    weight = np.zeros(shape, np.float32)
    calls.dequantize(packed.format, packed.addresses(), matrix(weight))
    assert np.allclose(weight, packed.values(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_restore_is_the_inverse_of_prepare(name: str, shape: tuple[int, int]) -> None:
    packed, _ = quantized(name, *shape)
    buffer = prepared(packed)
    back = Packed(packed.format, *shape)
    calls.restore(buffer.ctypes.data, buffer.size, back.addresses())
    assert np.array_equal(back.codes, packed.codes)
    assert np.array_equal(back.scales, packed.scales)
    assert packed.format.symmetric or np.array_equal(back.zeros, packed.zeros)
    assert back.unit == packed.unit


def test_weights_laid_out_together_are_as_each_by_itself() -> None:
    """Threads take four blocks at a time, which may begin in one weight and end in another."""
    weights = [
        quantized(name, rows, 203)[0] for name, rows in zip(FORMATS, (1, 37, 16, 300, 48) * len(FORMATS), strict=False)
    ]
    sizes = [calls.prepared_bytes(packed.format, packed.rows, packed.cols) for packed in weights]
    alone, together = ([aligned(size) for size in sizes] for _ in range(2))
    for buffer in (*alone, *together):
        buffer[:] = 0  # the gaps between the parts of a block are nobody's
    for packed, buffer in zip(weights, alone, strict=True):
        calls.prepare(packed.format, packed.rows, packed.cols, packed.addresses(), buffer.ctypes.data, buffer.size)
    calls.prepare_all(
        [
            calls.Preparing(
                packed.format, packed.rows, packed.cols, packed.addresses(), buffer.ctypes.data, buffer.size
            )
            for packed, buffer in zip(weights, together, strict=True)
        ]
    )
    for one, other in zip(alone, together, strict=True):
        assert np.array_equal(one, other)
    calls.prepare_all([])
    odd = calls.Preparing(
        weights[0].format, weights[0].rows, weights[0].cols, weights[0].addresses(), together[0].ctypes.data, 5
    )
    with pytest.raises(KernelError, match="bytes, got 5"):
        calls.prepare_all([odd])


@pytest.mark.parametrize("name", FORMATS)
def test_products_for_every_count_of_rows(name: str) -> None:
    for shape in SHAPES[1:]:
        packed, _ = quantized(name, *shape)
        buffer, weight = prepared(packed), packed.values()
        bias = np.random.default_rng(2).standard_normal(shape[0]).astype(np.float32)
        for rows in ROWS:
            x = np.random.default_rng(rows).standard_normal((rows, shape[1])).astype(np.float32)
            exact = x.astype(float) @ weight.T + bias
            assert distance(multiply(buffer, x, shape[0], "fp32", bias), exact) < TOLERANCE_FP32, (shape, rows)
            assert distance(multiply(buffer, x, shape[0], "int8", bias), exact) < TOLERANCE_INT8, (shape, rows)


def test_many_tokens_cross_every_block() -> None:
    packed, _ = quantized("int4", 48, 2112)
    x = np.random.default_rng(1).standard_normal((1100, 2112)).astype(np.float32)
    exact = x.astype(float) @ packed.values().T
    assert distance(multiply(prepared(packed), x, 48, "int8"), exact) < TOLERANCE_INT8


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_half_inputs_and_strides(dtype: type) -> None:
    packed, _ = quantized("int4_g32", 37, 203)
    wide = np.random.default_rng(1).standard_normal((19, 300)).astype(dtype)
    x, room = wide[:, :203], np.full((19, 50), 9, dtype)
    calls.run(
        *(lambda b: (b.ctypes.data, b.size))(buffer := prepared(packed)), matrix(x), matrix(room[:, :37]), 0, "fp32"
    )
    assert distance(room[:, :37].astype(float), x.astype(float) @ packed.values().T) < (
        1e-6 if dtype is np.float32 else 1e-3
    )
    assert (room[:, 37:] == 9).all() and buffer.size > 0


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_dense_weights(dtype: str, shape: tuple[int, int]) -> None:
    weight = np.random.default_rng(0).standard_normal(shape).astype(dtype)
    buffer = aligned(calls.dense_bytes(dtype, *shape))
    calls.prepare_dense(matrix(weight), buffer.ctypes.data, buffer.size)
    back = np.zeros_like(weight)
    calls.restore(buffer.ctypes.data, buffer.size, calls.Canonical(back.ctypes.data))
    assert np.array_equal(back, weight)
    for rows in ROWS:
        x = np.random.default_rng(rows).standard_normal((rows, shape[1])).astype(np.float32)
        assert (
            distance(multiply(buffer, x, shape[0], "fp32"), x.astype(float) @ weight.astype(float).T) < TOLERANCE_FP32
        )


def test_nan_inputs_stay_visible_and_only_in_their_row() -> None:
    packed, _ = quantized("int4", 16, 576)
    x = np.ones((3, 576), np.float32)
    x[1, 70] = np.nan
    y = multiply(prepared(packed), x, 16, "int8")
    assert np.isnan(y[1]).all() and np.isfinite(y[[0, 2]]).all()


@pytest.mark.parametrize("name", ["int4", "int3_asym_g32_fp32", "int8"])
def test_a_token_is_rounded_alike_in_a_whole_tile_and_in_a_part_of_one(name: str) -> None:
    packed, _ = quantized(name, 37, 203)
    x = np.random.default_rng(0).standard_normal((24, 203)).astype(np.float32)
    x[18], x[19, 70], x[20, 202] = 0, np.nan, np.inf
    whole, part = (multiply(prepared(packed), x[:count], 37, "int8") for count in (24, 23))
    assert np.array_equal(whole[:23], part, equal_nan=True)
    assert np.isnan(whole[[19, 20]]).all() and np.isfinite(np.delete(whole, [19, 20], axis=0)).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_named(bad: float) -> None:
    weight = np.ones((40, 203), np.float32)
    weight[31, 150] = bad
    packed = Packed(format_from_name("int4"), 40, 203)
    with pytest.raises(WeightError, match="row 31, column 150"):
        calls.quantize(packed.format, matrix(weight), packed.addresses())


def test_sizes_are_checked_before_any_address() -> None:
    packed, weight = quantized("int4", 16, 64)
    buffer = prepared(packed)
    x = np.zeros((2, 64), np.float32)
    with pytest.raises(KernelError, match="cannot be stored"):
        calls.quantize(packed.format, calls.Rows(0, "float32", -1, 64), packed.addresses())
    with pytest.raises(KernelError, match="cannot lie 3 apart"):
        calls.quantize(packed.format, calls.Rows(weight.ctypes.data, "float32", 16, 64, 3), packed.addresses())
    with pytest.raises(KernelError, match="buffer that this format needs"):
        calls.quantize(packed.format, matrix(weight), calls.Canonical(0))
    with pytest.raises(KernelError, match="bytes, got"):
        calls.prepare(packed.format, 16, 64, packed.addresses(), buffer.ctypes.data, buffer.size - 64)
    with pytest.raises(KernelError, match="bytes, got"):
        calls.run(buffer.ctypes.data, buffer.size - 64, matrix(x), matrix(x), 0)
    with pytest.raises(KernelError, match="do not fit a weight"):
        calls.run(buffer.ctypes.data, buffer.size, calls.Rows(x.ctypes.data, "float32", 2, 63), matrix(x), 0)
    buffer[0] ^= 1
    with pytest.raises(KernelError, match="prepare it again"):
        calls.run(buffer.ctypes.data, buffer.size, matrix(x), matrix(x), 0)
    with pytest.raises(KernelError, match="packs 1 to 8"):
        calls.pack(9, 1, 1, x.ctypes.data, x.ctypes.data)


def test_refusals_are_sentences() -> None:
    assert calls.refuses(format_from_name("int4"), (64, 64)) is None
    assert calls.refuses(format_from_name("q4_k"), (64, 256)) is None
    assert calls.refuses(format_from_name("int4_dq"), (4, 64, 256)) is None
    assert "no whole blocks" in str(calls.refuses(format_from_name("int4_dq"), (4, 20, 331)))
    assert calls.refuses(format_from_name("int4"), (64, 64), "bf16") is None
    assert "not in fp64" in str(calls.refuses(format_from_name("int4"), (64, 64), "fp64"))
    assert "stacks of them" in str(calls.refuses(format_from_name("int4"), (2, 2, 64, 64)))
    with pytest.raises(KernelError, match="no instruction set"):
        calls.set_instruction_set("abacus")
    assert library.library_path() is not None


def test_any_number_of_threads_gives_the_same_product() -> None:
    packed, _ = quantized("int4_g32", 131, 203)
    buffer = prepared(packed)
    x = np.random.default_rng(5).standard_normal((40, 203)).astype(np.float32)
    before = calls.threads()
    products = []
    for threads in (1, 2, 5):
        calls.set_threads(threads)
        products.append(multiply(buffer, x, 131, "int8"))
    calls.set_threads(before)
    assert all(np.array_equal(product, products[0]) for product in products)


def test_a_forked_child_has_threads_of_its_own() -> None:
    packed, _ = quantized("int4_g32", 256, 203)
    buffer = prepared(packed)
    x = np.ones((40, 203), np.float32)
    expected = multiply(buffer, x, 256, "int8")
    child = os.fork()
    if child == 0:
        os._exit(0 if np.array_equal(multiply(buffer, x, 256, "int8"), expected) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
