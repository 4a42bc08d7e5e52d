"""Products with bf16 on both sides: on tiles, in pairs (AVX-512), and on the stand-in for tiles everywhere.

    y[t][r] = sum of  bf16(x[t][k]) bf16(w[r][k])   in fp32, in whatever order

A number rounded to bf16 is off by at most 2^-8 of itself, and a sum of n products in fp32 by n 2^-24 of the sum of their sizes; the
products themselves are exact.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from cpu import test_core as core
from cpu.test_engine import ids, relative, spec_and_arrays
from cpu.test_folded import numbers
from cpu.test_tight import plain_and_tight
from lowbit.core import calls
from lowbit.models.spec import DecoderSpec
from lowbit.runtime.engine import Engine
from lowbit.runtime.weights import EngineWeights, engine_weights

# With the set whose lanes they have and which rounds to bf16 with numbers of fp32.
SETS = {"amx": "avx512", "avx512_bf16": "avx512", "amx_emulated": "portable"}
BY_DEFAULT = ("amx", "amx_emulated")
# A tile of tokens and parts of one, and more than share an item.
TOKENS = (17, 32, 33, 48, 530)
# Less than a step, one and a part, rows that fill no block, no pair and no item, and more inputs than a panel has.
SHAPES = [(37, 20), (48, 203), (16, 576), (131, 1057)]
HALF_STEP, ONE_SUM = 2.0**-8, 2.0**-24


@pytest.fixture(params=core.sets_here(SETS))
def brains(request: pytest.FixtureRequest) -> Iterator[str]:
    calls.set_instruction_set(request.param)
    yield request.param
    calls.set_instruction_set(None)


def narrow(values: NDArray[np.float32]) -> NDArray[np.float32]:
    return torch.from_numpy(values).bfloat16().float().numpy()


def dense(weight: NDArray[np.float32]) -> NDArray[np.uint8]:
    """A weight prepared in bf16."""
    halves = torch.from_numpy(weight).bfloat16().view(torch.uint16).numpy()
    buffer = core.aligned(calls.dense_bytes("bfloat16", *weight.shape))
    calls.prepare_dense(calls.Rows(halves.ctypes.data, "bfloat16", *halves.shape), buffer.ctypes.data, buffer.size)
    return buffer


@pytest.mark.parametrize("shape", SHAPES)
def test_dense_weights_are_off_by_the_order_of_sums_and_by_rounded_activations(
    brains: str, shape: tuple[int, int]
) -> None:
    rows, cols = shape
    weight = narrow(numbers(rows, cols))
    buffer, bias = dense(weight), numbers(1, rows, 3)[0]
    for tokens in TOKENS:
        x = numbers(tokens, cols, tokens)
        sizes = np.abs(x).astype(float) @ np.abs(weight).T.astype(float) + np.abs(bias)
        rounded, exact = (v.astype(float) @ weight.T.astype(float) + bias for v in (narrow(x), x))
        asked, default, whole = (core.multiply(buffer, x, rows, compute, bias) for compute in ("bf16", "auto", "fp32"))
        assert (np.abs(asked - rounded) <= (cols + 1) * ONE_SUM * 1.01 * sizes).all(), tokens
        assert (np.abs(asked - exact) <= (HALF_STEP + (cols + 1) * ONE_SUM) * 1.01 * sizes).all(), tokens
        assert np.array_equal(default, asked if brains in BY_DEFAULT else whole)
        assert (np.abs(whole - exact) <= (cols + 1) * ONE_SUM * 1.01 * sizes).all() and not np.array_equal(whole, asked)


@pytest.mark.parametrize("name", core.FORMATS)
def test_packed_weights_are_rounded_as_other_sets_round_them(brains: str, name: str) -> None:
    for rows, cols in SHAPES:
        packed, _ = core.quantized(name, rows, cols)
        buffer, x = core.prepared(packed), numbers(40, cols, 2)
        calls.set_instruction_set(brains)
        found, few = core.multiply(buffer, x, rows, "bf16"), core.multiply(buffer, x[:3], rows, "bf16")
        calls.set_instruction_set(SETS[brains])
        expected = core.multiply(buffer, x, rows, "bf16")
        sizes = np.abs(x) @ np.abs(packed.values()).T * (1 + HALF_STEP) ** 2
        assert (np.abs(found - expected) <= 2 * cols * ONE_SUM * 1.01 * sizes + 1e-30).all(), (rows, cols)
        assert (np.abs(few - expected[:3]) <= 2 * cols * ONE_SUM * 1.01 * sizes[:3] + 1e-30).all(), (rows, cols)
        assert not np.array_equal(found, core.multiply(buffer, x, rows, "fp32"))


def test_halves_strides_and_every_number_of_threads(brains: str) -> None:
    weight = narrow(numbers(131, 203))
    buffer, wide = dense(weight), numbers(700, 300).astype(np.float16)
    x, room = wide[:, :203], np.full((700, 150), 9, np.float16)
    before = calls.threads()
    results = []
    for threads in (1, 2, 5):
        calls.set_threads(threads)
        calls.run(buffer.ctypes.data, buffer.size, core.matrix(x), core.matrix(room[:, :131]), 0, "bf16")
        results.append(room.copy())
    calls.set_threads(before)
    expected = narrow(x.astype(np.float32)).astype(float) @ weight.T.astype(float)
    assert (np.abs(room[:, :131] - expected) <= 2.0**-11 * np.abs(expected) + 1e-3).all()
    assert (room[:, 131:] == 9).all()
    assert all(np.array_equal(result, results[0]) for result in results)


def test_numbers_that_are_none_stay_in_their_row(brains: str) -> None:
    x = np.ones((40, 576), np.float32)
    x[1, 70], x[2, 571], x[3, 5] = np.nan, np.inf, 3.4e38  # the last is infinite in bf16
    y = core.multiply(dense(np.ones((20, 576), np.float32)), x, 20, "bf16")
    assert np.isnan(y[1]).all() and np.isinf(y[2:4]).all() and (y[4:] == 576).all() and (y[0] == 576).all()


def prompts(spec: DecoderSpec, weights: EngineWeights, compute: str) -> list[NDArray[np.float32]]:
    """Logits of prompts of 9 and of 70 tokens."""
    found = []
    with Engine(spec, weights, 96, cache="fp32", compute=compute) as engine:
        for count in (9, 70):
            engine.reset()
            found.append(engine.logits(ids(count)))
    return found


@pytest.mark.parametrize("case", ["llama", "phi3", "mixtral"])
def test_prompts_of_bf16_models(brains: str, case: str) -> None:
    """Plain and tight rows, biases, fused projections and experts. Few tokens meet weights in fp32, and so do the rows of
    an expert that has few, which plain and tight rows add in another order."""
    spec, loose, tight = plain_and_tight(case)
    least, most = 1e-4, 0.1 if case == "mixtral" else 0.02  # a token may choose another expert
    calls.set_instruction_set(SETS[brains])
    exact = prompts(spec, loose, "fp32")
    calls.set_instruction_set(brains)
    for compute in ("auto", "bf16") if brains in BY_DEFAULT else ("bf16",):
        few, many = prompts(spec, loose, compute)
        assert relative(few, exact[0]) < 1e-5 and least < relative(many, exact[1]) < most
        of_tight = prompts(spec, tight, compute)[1]
        assert relative(of_tight, many) < 0.01 if case == "mixtral" else np.array_equal(of_tight, many)
    for weights, compute in ((loose, "fp32"), (tight, "fp32" if brains in BY_DEFAULT else "auto")):
        assert all(relative(a, b) < 1e-5 for a, b in zip(prompts(spec, weights, compute), exact, strict=True))


def test_weights_in_fp32_are_never_rounded(brains: str) -> None:
    spec, tensors = spec_and_arrays("llama")
    logits = []
    for compute in ("auto", "bf16", "fp32"):
        with Engine(spec, engine_weights(spec, tensors), 96, cache="fp32", compute=compute) as engine:
            logits.append(engine.logits(ids(70)))
    assert np.array_equal(logits[0], logits[2]) and np.array_equal(logits[1], logits[2])


def test_the_core_says_that_it_rounds(brains: str) -> None:
    assert ("from 17 tokens on" in calls.rounding()) == (brains in BY_DEFAULT)
    calls.set_instruction_set(SETS[brains])
    assert calls.rounding() == ""
