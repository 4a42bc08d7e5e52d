"""From a saved model to one that answers: every weight is read once and laid out once.

    model = load("folder")                     # as it was saved: plain, compressed-tensors, lowbit's own form, or a .gguf file
    model = load("folder", format="int4")      # made low-bit on the way, one weight in memory at a time

A packed weight becomes the buffer that the core's products read, and its pages of the file are given back. So does a plain weight
in bf16 where the processor decodes its tight form (tight.py) and memory allows it; other plain weights stay in the file and are
read through the map, as all do with `mapped=True`. Either way a weight lies in memory once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeGuard

import numpy as np

from lowbit.errors import RecipeError
from lowbit.formats import Format
from lowbit.models.spec import DecoderSpec
from lowbit.packing import PackedTensor
from lowbit.recipe import Recipe, recipe_named
from lowbit.runtime.embedding import Embedder
from lowbit.runtime.engine import DEFAULT_CACHE, Engine
from lowbit.runtime.files import Loaded, ModelFiles, open_files, read_spec, read_weights
from lowbit.runtime.model import Model
from lowbit.runtime.settings import settings_from
from lowbit.runtime.stored import Dense, Weight, dequantize
from lowbit.runtime.text import Tokenizer
from lowbit.runtime.tight import Tightening
from lowbit.runtime.weights import MATRIX_ROLES, EngineWeights, Matrix, Preparation, plain

# Longer contexts have to be asked for: the cache of a 7B model takes 1 GB for 8192 tokens.
LONGEST_DEFAULT_CONTEXT = 8192
# Tables that are looked up or too small to matter: the engine takes them as plain numbers.
_PLAIN_ROLES = ("positions", "router", "shared_router")


def load(
    path: str | Path,
    format: str | Format | Recipe | None = None,
    context: int | None = None,
    slots: int = 1,
    cache: str = DEFAULT_CACHE,
    compute: str = "auto",
    *,
    mapped: bool = False,
) -> Model:
    """A model from a folder or a .gguf file.

    `context` is the most tokens that a prompt and its answer have together, `slots` how many sequences (or beams) are kept at once,
    `cache` the type of their keys and values ("auto": int8 where products round to int8, else fp16), `compute` how products are
    made: "int8" rounds activations, "fp32" rounds nothing. `mapped` leaves plain weights in their file: slower, and pages that the
    system may take back.
    """
    recipe = None if format is None else recipe_named(format)
    return load_files(open_files(path), recipe, context, slots, cache, compute, mapped=mapped)


def load_files(
    files: ModelFiles,
    recipe: Recipe | None = None,
    context: int | None = None,
    slots: int = 1,
    cache: str = DEFAULT_CACHE,
    compute: str = "auto",
    *,
    mapped: bool = False,
) -> Model:
    """As `load`, from files that are open already."""
    spec = read_spec(files)
    with ThreadPoolExecutor(1, "lowbit-tokenizer") as pool:
        tokenizer = _Beside(pool, files.tokenizer)
        tightening = Tightening(not mapped)
        weights = load_weights(files, spec, recipe, tokenizer.begin, tightening)
        files.check()
        engine = Engine(spec, weights, _context(spec, context), cache, slots, compute)
        model = Model(engine, tokenizer.result(), settings_from(files.generation_config, spec.tokens.eos))
    model.notes = files.notes + tightening.notes
    model.check_files = files.check
    model.make_embedder = lambda: Embedder(spec, weights, engine.context, engine.cache, compute)
    return model


class _Beside:
    """The tokenizer, read in a thread of its own from the moment when the core lays weights out. Before, both would wait for the
    interpreter, which a tokenizer.json of 3.5 MB holds for 0.1 s."""

    def __init__(self, pool: ThreadPoolExecutor, read: Callable[[], Tokenizer | None]) -> None:
        self._pool, self._read = pool, read
        self._reading: Future[Tokenizer | None] | None = None

    def begin(self) -> None:
        """Start, or say what was wrong with it: a large model need not be read to its end for that."""
        if self._reading is None:
            self._reading = self._pool.submit(self._read)
        elif self._reading.done():
            self._reading.result()

    def result(self) -> Tokenizer | None:
        self.begin()
        assert self._reading is not None
        return self._reading.result()


def load_weights(
    files: ModelFiles,
    spec: DecoderSpec,
    recipe: Recipe | None = None,
    before: Callable[[], None] = lambda: None,
    tightening: Tightening | None = None,
) -> EngineWeights:
    """Every weight of a model as the engine takes it; `before` is called before each piece of the core's work."""
    return lay_out(read_weights(files, spec, recipe), spec, before, tightening)


def lay_out(
    weights_read: Iterable[Loaded],
    spec: DecoderSpec,
    before: Callable[[], None] = lambda: None,
    tightening: Tightening | None = None,
) -> EngineWeights:
    """The same of weights that are read already, or of some layers alone."""
    weights, preparation = EngineWeights(), Preparation(before)
    looked_up = _PLAIN_ROLES if spec.head.tied else (*_PLAIN_ROLES, "embedding")
    for loaded in weights_read:
        key = (loaded.role, loaded.layer)
        bias = None if loaded.bias is None else np.array(loaded.bias.array, np.float32).ravel()
        if loaded.role not in MATRIX_ROLES:
            weight = dequantize(loaded.weight) if isinstance(loaded.weight, PackedTensor) else loaded.weight
            weights.vectors[key] = (np.array(weight.float32(), np.float32).ravel(), bias)
        else:
            tight = None
            if tightening is not None and _is_brain(loaded.weight) and loaded.role not in looked_up:
                before()
                tight = tightening.add(loaded.weight.array)
            weights.matrices[key] = (tight or _matrix(loaded, preparation)).with_bias(bias)
    preparation.finish()
    return weights


def _is_brain(weight: Weight) -> TypeGuard[Dense]:
    return isinstance(weight, Dense) and weight.dtype == "bfloat16"


def _matrix(loaded: Loaded, preparation: Preparation) -> Matrix:
    weight = loaded.weight
    if isinstance(weight, PackedTensor):
        if loaded.role not in _PLAIN_ROLES:
            return preparation.add(weight)
        weight = dequantize(weight)
    return plain(weight.array, weight.dtype)


def _context(spec: DecoderSpec, asked: int | None) -> int:
    if asked is None:
        return min(spec.max_positions, LONGEST_DEFAULT_CONTEXT)
    if not 1 <= asked <= spec.max_positions:
        raise RecipeError(f"context={asked} is out of range; this model was made for 1 to {spec.max_positions} tokens")
    return asked
