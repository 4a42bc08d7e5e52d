"""bf16 weights in 12 bits: the same bits back, the same logits from every instruction set, and when they are used."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from cpu.test_core import instruction_sets
from cpu.test_engine import CACHE_TOLERANCE, ids, relative, spec_and_arrays
from lowbit.core import calls
from lowbit.core.arena import shorten, weight_memory
from lowbit.errors import RecipeError, WeightError
from lowbit.models.spec import DecoderSpec
from lowbit.runtime import abi, load
from lowbit.runtime.engine import Engine
from lowbit.runtime.files import open_files, read_spec
from lowbit.runtime.loading import load_weights
from lowbit.runtime.tight import Tightening, loosen, tight_pays, tighten
from lowbit.runtime.weights import EngineWeights, Matrix, bytes_at, engine_weights, fingerprint, plain
from lowbit_assets import tiny_model_in_memory

Halves = NDArray[np.uint16]
LARGE = [0xBF20, 0x3F10]  # -0.625 and 0.5625: weights are 0.06 large
NAN, INFINITE, NEGATIVE_ZERO, DENORMAL = 0x7FC1, 0xFF80, 0x8000, 0x0001


@pytest.fixture(params=instruction_sets())
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    calls.set_instruction_set(request.param)
    yield request.param
    calls.set_instruction_set(None)


def trained(rows: int, cols: int, seed: int = 1) -> Halves:
    """Bells with a scale for each row, as trained weights have them."""
    random = np.random.default_rng(seed)
    weight = random.normal(0, 0.02, (rows, cols)) * np.exp(random.normal(0, 0.5, (rows, 1)))
    return torch.from_numpy(weight).to(torch.bfloat16).view(torch.uint16).numpy()


def with_exceptions(rows: int, cols: int) -> Halves:
    """A few numbers of every size, and some that are none, in the first and last column among others."""
    weight = trained(rows, cols)
    random = np.random.default_rng(2)
    places = random.choice(weight.size, weight.size // 400, replace=False)
    weight.reshape(-1)[places] = random.integers(0, 1 << 16, len(places))
    weight[0, 0], weight[-1, -1], weight[1, 0], weight[-1, 0] = NAN, INFINITE, NEGATIVE_ZERO, DENORMAL
    return weight


@pytest.mark.parametrize("shape", [(64, 256), (61, 443), (130, 1000), (64, 320)])
def test_weights_come_back_bit_for_bit(shape: tuple[int, int], instruction_set: str) -> None:
    weights = {
        "trained": trained(*shape),
        "zeros": np.zeros(shape, np.uint16),
        "negative zeros": np.full(shape, NEGATIVE_ZERO, np.uint16),
        "nan": np.full(shape, NAN, np.uint16),
        "infinite": np.full(shape, INFINITE, np.uint16),
        "denormal": np.arange(shape[0] * shape[1], dtype=np.uint16).reshape(shape) % 128,
        "exceptions": with_exceptions(*shape),
    }
    for name, weight in weights.items():
        matrix = tighten(weight)
        assert matrix is not None and np.array_equal(loosen(matrix)[0], weight), name
        assert matrix.bytes < weight.nbytes


@settings(max_examples=30)
@given(st.data())
def test_any_bits_come_back_or_stay_plain(data: st.DataObject) -> None:
    rows, cols = data.draw(st.integers(61, 70)), data.draw(st.integers(300, 380))
    upper = data.draw(st.lists(st.integers(0, 255), min_size=1, max_size=20))
    random = np.random.default_rng(data.draw(st.integers(0, 1 << 20)))
    weight = (random.choice(upper, (rows, cols)) << 8 | random.integers(0, 256, (rows, cols))).astype(np.uint16)
    matrix = tighten(weight)
    if matrix is None:
        assert len(set(upper) | {0}) > 16
    else:
        assert np.array_equal(loosen(matrix)[0], weight)


def test_memory_that_was_not_needed_is_taken_again() -> None:
    shorten(weight_memory(64), 0)
    whole = weight_memory(4096)
    kept = shorten(whole, 1000)
    after = weight_memory(64)
    assert kept.size == 1000 and after.ctypes.data == whole.ctypes.data + 1024
    shorten(kept, 0)  # no longer the last: its memory stays taken
    assert weight_memory(64).ctypes.data == after.ctypes.data + 64


def as_halves(matrix: Matrix, weight: Halves) -> Matrix:
    return replace(plain(weight, "bfloat16"), bias=matrix.bias)


def plain_and_tight(case: str) -> tuple[DecoderSpec, EngineWeights, EngineWeights]:
    """One model with bf16 weights twice."""
    spec, tensors = spec_and_arrays(case, hidden_size=240, head_dim=40, intermediate_size=336)
    weights = engine_weights(spec, tensors)
    loose, tight = EngineWeights({}, weights.vectors), EngineWeights({}, weights.vectors)
    random = np.random.default_rng(3)
    for key, matrix in weights.matrices.items():
        weight = torch.from_numpy(np.ascontiguousarray(matrix.owner)).to(torch.bfloat16).view(torch.uint16).numpy()
        # Tiny numbers take the last places of the table, so that large ones of which there are few are exceptions.
        places = random.choice(weight.size, weight.size // 30, replace=False)
        weight.reshape(-1)[places] = random.choice([0x3001, 0xB102, 0x2003], len(places))
        weight.reshape(-1)[places[: weight.size // 500]] = random.choice(LARGE, weight.size // 500)
        loose.matrices[key] = as_halves(matrix, weight)
        laid_out = None if key[0] == "router" else tighten(weight)
        tight.matrices[key] = loose.matrices[key] if laid_out is None else laid_out.with_bias(matrix.bias)
    return spec, loose, tight


@pytest.mark.parametrize("case", ["llama", "llama, biases, wide heads", "phi3", "mixtral"])
def test_logits_are_those_of_the_plain_weights(case: str, instruction_set: str) -> None:
    """Tied heads, biases, fused projections, experts; steps of 1, 3, 4, 9 and 40 tokens, ends that fill no unit of 64 inputs."""
    spec, loose, tight = plain_and_tight(case)
    kinds = {key: matrix.kind for key, matrix in tight.matrices.items()}
    data = bytes_at(tight.matrices["o", 0])
    assert set(LARGE) <= set(
        data[int(data[64:72].view(np.int64)[0]) :].view(np.uint32) & 0xFFFF
    )  # among the exceptions
    assert kinds["o", 0] == abi.TIGHT and list(kinds.values()).count(abi.TIGHT) > len(kinds) / 2
    exact = {"cache": "fp32", "compute": "fp32"}
    with Engine(spec, loose, 96, **exact) as one, Engine(spec, tight, 96, **exact) as other:
        for count in (1, 3, 4, 9, 40):
            assert relative(other.logits(ids(count)), one.logits(ids(count))) < CACHE_TOLERANCE["fp32"]


def test_a_prompt_in_a_file_belongs_to_the_tight_model_too() -> None:
    spec, loose, tight = plain_and_tight("llama")
    assert fingerprint(spec, loose) == fingerprint(spec, tight)
    tight.matrices["o", 0] = tighten(trained(240, 240)) or loose.matrices["o", 0]
    assert fingerprint(spec, loose) != fingerprint(spec, tight)


def test_damaged_layouts_are_refused() -> None:
    spec, _loose, tight = plain_and_tight("llama")
    matrix = tight.matrices["down", 0]
    data = bytes_at(matrix)
    others = int(data[64:72].view(np.int64)[0])  # where the exceptions begin
    for place, sentence in ((0, "lowbit_tighten"), (20, "written over"), (others + 3, "exceptions")):
        kept = int(data[place])
        data[place] = 0xFF
        with pytest.raises(RecipeError, match=sentence):
            Engine(spec, tight, 96)
        data[place] = kept
    cut = replace(matrix, bytes=matrix.bytes - 64)
    with pytest.raises(WeightError, match="do not lie where its sizes say"):
        loosen(cut)
    Engine(spec, tight, 96).close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("brains")
    model = tiny_model_in_memory("llama", hidden_size=256, intermediate_size=512, tie_word_embeddings=False)
    model.to(torch.bfloat16).save_pretrained(path)
    return path


def test_loading_lays_out_what_a_token_reads(folder: Path, instruction_set: str) -> None:
    model, mapped = load(folder), load(folder, mapped=True)
    assert not mapped.notes
    assert any("held exactly in 12" in note for note in model.notes) == tight_pays()
    assert relative(model.logits(range(5, 40)), mapped.logits(range(5, 40))) < 1e-3  # keys and values in fp16
    assert isinstance(model.engine, Engine) and isinstance(mapped.engine, Engine)
    assert model.engine.identity == mapped.engine.identity


@pytest.mark.parametrize("free", [1 << 20, None])
def test_weights_stay_in_the_file_where_memory_is_short(folder: Path, free: int | None) -> None:
    files = open_files(folder)
    spec, tightening = read_spec(files), Tightening(available=lambda: free)
    weights = load_weights(files, spec, tightening=tightening)
    kind = abi.PLAIN if free or not tight_pays() else abi.TIGHT
    assert weights.matrices["down", 0].kind == weights.matrices["head", None].kind == kind
    assert weights.matrices["embedding", None].kind == abi.PLAIN  # rows are looked up, a token reads one of them
    if tight_pays():
        assert [("held exactly in 12" in note, "too little memory" in note) for note in tightening.notes] == [
            (not free, bool(free))
        ]
