"""Products of many tokens with the scales of groups folded into int8: on tiles where there are any, on their stand-in everywhere.

    f = (max |x[.][k]| / max |x|)^(1/4)      the balance of an input, which goes from activations to weights
    w8 = round(w f / s), x8 = round(x / f / sx)    s and sx one for at most 1,024 inputs:  y = sum of  s sx sum(w8 x8)

Both roundings are off by at most half a step and by a twelfth of its square on average, and that is the whole error, with
w f for w and x / f for x:

    |y - exact| <= sum of  s/2 |x| + sx/2 (|w| + s/2)        E (y - exact)^2 = sum of  s^2/12 x^2 + sx^2/12 w^2

A table of levels is rounded to bytes first, which is one more rounding of the same size. The steps are taken from whole
rows here, which is no smaller than from stretches of them.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from cpu import test_core as core
from lowbit.core import calls
from lowbit.formats import as_format
from lowbit.grid import quantize, unpack
from lowbit.kernels import cpu_rows

TOKENS = (17, 32, 33, 48, 256)
# One step, several stretches with a short tail, rows that fill no block, and groups that cross stretches.
SHAPES = [(37, 60), (48, 203), (16, 576), (131, 1057)]
PLAIN = {"amx": "avx512", "amx_emulated": "portable"}


STORED_WITH_MINIMA_OR_TWO_LEVELS = ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "q4_1", "q5_1", "int4_g64_dq")


@pytest.fixture(params=core.sets_here(PLAIN))
def tiles(request: pytest.FixtureRequest) -> Iterator[str]:
    calls.set_instruction_set(request.param)
    yield request.param
    calls.set_instruction_set(None)


def numbers(rows: int, cols: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((rows, cols)).astype(np.float32)


def largest_weights(packed: core.Packed) -> NDArray[np.float64]:
    """[rows]: what the codes of a row could stand for at most, which its step follows from."""
    format, scales = packed.format, np.abs(packed.float_scales())
    if format.levels:
        reach: NDArray[np.float64] | float = float(np.nanmax(np.abs(format.levels)))
    elif format.symmetric:
        reach = float(format.midpoint)
    else:
        reach = np.maximum(packed.zeros, format.max_code - packed.zeros).astype(float)
    return (scales * reach).max(axis=1)


def balance(x: NDArray[np.float32]) -> NDArray[np.float64]:
    """[cols]: as fold.h has it, for rows of one stretch; of several the largest input of each would count."""
    seen = np.abs(x[:: 1 + len(x) // 64]).max(axis=0).astype(float)
    return np.clip(np.floor(128 * (seen / seen.max()) ** 0.25 + 0.5), 1, 128) / 128


@pytest.mark.parametrize("name", core.FORMATS)
def test_folding_costs_two_roundings_and_no_more(tiles: str, name: str) -> None:
    for shape in SHAPES:
        packed, _ = core.quantized(name, *shape)
        buffer, weight = core.prepared(packed), packed.values()
        # Levels that are whole bytes use at least 112 of the 127 steps.
        step = (largest_weights(packed) / (112 if packed.format.levels else 127))[None, :]
        roundings = 2 if packed.format.levels else 1
        for tokens in TOKENS:
            x = numbers(tokens, shape[1], tokens)
            exact = x.astype(float) @ weight.T
            error = core.multiply(buffer, x, shape[0], "auto") - exact
            lighter, heavier = x / balance(x), weight * balance(x)
            x_step = (np.abs(lighter).max(axis=1) / 127)[:, None]
            most = roundings * step / 2 * np.abs(lighter).sum(axis=1)[:, None]
            most = most + x_step / 2 * (np.abs(heavier).sum(axis=1)[None, :] + roundings * step / 2 * shape[1])
            assert (np.abs(error) <= most * 1.01 + 1e-5).all(), (shape, tokens)
            variance = roundings * step**2 / 12 * (lighter**2).sum(axis=1)[:, None]
            variance = variance + x_step**2 / 12 * (heavier**2).sum(axis=1)[None, :]
            assert np.linalg.norm(error) <= 1.1 * np.sqrt(variance.sum()), (shape, tokens)


@pytest.mark.parametrize("name", STORED_WITH_MINIMA_OR_TWO_LEVELS)
def test_minima_and_second_levels_fold_too(tiles: str, name: str) -> None:
    format = as_format(name)
    packed = quantize(torch.from_numpy(numbers(48, 512)) + 0.3, format)
    weight, x = unpack(packed).double(), torch.from_numpy(numbers(40, 512, 1))
    error = cpu_rows.run(x, cpu_rows.prepare(packed), format, (48, 512), "auto") - x.double() @ weight.T
    share = torch.from_numpy(balance(x.numpy()))
    heavier, lighter = weight * share, x / share
    steps = [a.abs().amax(-1) / 127 for a in (heavier, lighter)]
    squares = [a.square().sum(-1) for a in (heavier, lighter)]
    variance = (torch.outer(squares[1], steps[0] ** 2) + torch.outer(steps[1] ** 2, squares[0])) / 12
    assert error.norm() <= 1.1 * variance.sum().sqrt()


def test_a_row_with_one_scale_is_rounded_only_where_the_activations_are(tiles: str) -> None:
    packed, _ = core.quantized("int8_channel", 48, 200)
    x = np.random.default_rng(1).integers(-127, 128, (40, 200)).astype(np.float32)
    x[:, 0] = 127  # makes every step exactly 1
    exact = x.astype(float) @ packed.values().T
    assert core.distance(core.multiply(core.prepared(packed), x, 48, "auto"), exact) < 1e-6


def test_int8_keeps_the_scale_of_every_group_and_few_tokens_always_do(tiles: str) -> None:
    packed, _ = core.quantized("int4_asym_g32", 131, 203)
    buffer = core.prepared(packed)
    x = numbers(64, 203)
    groups, folded, few = (core.multiply(buffer, x[:n], 131, c) for n, c in ((64, "int8"), (64, "auto"), (16, "auto")))
    calls.set_instruction_set(PLAIN[tiles])
    assert core.distance(groups, core.multiply(buffer, x, 131, "auto").astype(float)) < 1e-6
    assert core.distance(few, core.multiply(buffer, x[:16], 131, "auto").astype(float)) < 1e-6
    assert core.distance(folded, groups.astype(float)) > 1e-4


def test_the_core_says_whether_it_folds(tiles: str) -> None:
    assert calls.fold_length() == 1024
    calls.set_instruction_set(PLAIN[tiles])
    assert calls.fold_length() == 0


def test_bias_strides_halves_and_every_number_of_threads(tiles: str) -> None:
    packed, _ = core.quantized("int4_g32", 131, 203)
    buffer, bias = core.prepared(packed), numbers(1, 131, 3)[0]
    wide = numbers(700, 300).astype(np.float16)
    x, room = wide[:, :203], np.full((700, 150), 9, np.float16)
    before = calls.threads()
    results = []
    for threads in (1, 2, 5):
        calls.set_threads(threads)
        calls.run(buffer.ctypes.data, buffer.size, core.matrix(x), core.matrix(room[:, :131]), bias.ctypes.data, "auto")
        results.append(room.copy())
    calls.set_threads(before)
    assert core.distance(room[:, :131], x.astype(float) @ packed.values().T + bias) < 0.015
    assert (room[:, 131:] == 9).all()
    assert all(np.array_equal(result, results[0]) for result in results)


def test_numbers_that_are_none_stay_in_their_row(tiles: str) -> None:
    packed, _ = core.quantized("int4", 16, 576)
    x = np.ones((40, 576), np.float32)
    x[1, 70], x[2, 571] = np.nan, np.inf
    y = core.multiply(core.prepared(packed), x, 16, "auto")
    assert np.isnan(y[1:3]).all() and np.isfinite(y[3:]).all() and np.isfinite(y[0]).all()


@pytest.mark.parametrize(
    "name", ["int4_g64", "int4_asym_g32", "int4_fine_g32", "int3_fine_g64", "nf4", "int3_g32", "int8_g64"]
)
def test_groups_of_zeros_cost_their_neighbours_nothing(tiles: str, name: str) -> None:
    """Their scale is 1 by definition, many times that of small weights."""
    weight = numbers(16, 512) * 0.02
    weight[:, 64:128] = 0
    weight[5] = 0
    packed = core.Packed(core.format_from_name(name), 16, 512)
    calls.quantize(packed.format, core.matrix(weight), packed.addresses())
    x = numbers(20, 512, 1)
    y = core.multiply(core.prepared(packed), x, 16, "auto")
    assert (y[:, 5] == 0).all()
    assert core.distance(y, x.astype(float) @ packed.values().T) < 0.013
