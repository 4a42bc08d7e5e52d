"""Does the exported folder answer as its source? Logits and greedy tokens, on every device that is here.

    exact      nothing rounded that need not be: f32 throughout. The graph must give the source's numbers: this passes or fails
    default    as the device likes it (bf16, activations in 8 bits, keys and values in 8 bits): how far that moves the answers

The source is run by lowbit's own engine, in f32, over the same codes. Where plain weights were rounded by the export a line
more says what the rounding itself moved, against the plain source. Divergence is KL(source || folder), the mean over the
tokens of a text; a first difference of greedy tokens that the source itself finds nearly even is a tie and no failure.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowbit.errors import LowbitError
from lowbit.openvino.export import Written
from lowbit.openvino.library import core, device, devices
from lowbit.openvino.native import load
from lowbit.openvino.opening import EXACT
from lowbit.recipe import Recipe
from lowbit.runtime.files import ModelFiles, read_tokenizer
from lowbit.runtime.loading import load_files
from lowbit.runtime.model import Model

TEXT = (
    "The museum opened in 1897 and was closed for 12 years during the war. When it was opened again, 3,400 people came on "
    'the first day alone; most of them had walked, for there was no other way. "We did not expect that," its director said.'
)
_PROMPT, _ANSWER = 48, 32
# Of the largest logit: f32 products summed in another order differ by 1e-6 to 1e-5 after thirty layers.
EXACT_LIMIT = 1e-3
# In nats: 8-bit activations and keys move answers by 0.001 to 0.02; a broken kernel by whole nats.
DEFAULT_LIMIT = 0.2
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Row:
    """One device in one setting. `same` of `tokens` greedy tokens came before the first difference."""

    device: str
    setting: str
    difference: float = 0.0
    divergence: float = 0.0
    same: int = 0
    tokens: int = 0
    tie: bool = False
    error: str = ""
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        if self.error or not np.isfinite(self.difference):
            return False
        if self.setting == "exact":
            return self.difference <= EXACT_LIMIT and (self.same == self.tokens or self.tie)
        return self.divergence <= DEFAULT_LIMIT

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"passed": self.passed}


@dataclass(frozen=True)
class Verification:
    """All rows, and what the rounding of the export moved: KL(plain source || folder), None where nothing was rounded."""

    rows: tuple[Row, ...]
    rounding: float | None = None

    @property
    def passed(self) -> bool:
        return all(row.passed for row in self.rows)


@dataclass(frozen=True)
class _Truth:
    """What the source says: logits after each token of a text, and its greedy answer."""

    prompt: list[int]
    logits: Floats
    tokens: list[int]
    gaps: list[Floats]


def verify(written: Written, on: Iterable[str] | None = None) -> Verification:
    """Compare an exported folder with its source, on the devices named or on all that are here."""
    chosen = devices() if on is None else [device(name) for name in on]
    prompt = _prompt(written)
    truth = _ask_source(written.files, written.recipe, prompt)
    rounding = None
    if written.recipe is not None:
        plain = _source(written.files, None)
        rounding = divergence(plain.logits(prompt), truth.logits)
        del plain
        gc.collect()
    rows = [_row(written, name, setting, truth) for name in chosen for setting in ("exact", "default")]
    return Verification(tuple(rows), rounding)


def divergence(expected: Floats, found: Floats) -> float:
    """KL(expected || found), the mean over tokens, in nats."""
    p, q = (_log_softmax(logits) for logits in (expected, found))
    return float((np.exp(p) * (p - q)).sum(-1).mean())


def _log_softmax(logits: Floats) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))


def _prompt(written: Written) -> list[int]:
    room = max(2, min(_PROMPT, written.spec.max_positions - _ANSWER - 1))
    tokenizer = read_tokenizer(written.folder)
    if tokenizer is not None:
        return tokenizer.encode(TEXT)[:room]
    generator = np.random.default_rng(0)
    return [int(token) for token in generator.integers(0, written.spec.vocab_size, room)]


def _source(files: ModelFiles, recipe: Recipe | None) -> Model:
    return load_files(files, recipe, cache="fp32", compute="fp32")


def _ask_source(files: ModelFiles, recipe: Recipe | None, prompt: list[int]) -> _Truth:
    model = _source(files, recipe)
    logits = model.logits(prompt)
    tokens, gaps = _greedy(model, prompt)
    del model
    gc.collect()
    return _Truth(prompt, logits, tokens, gaps)


def _greedy(model: Model, prompt: list[int]) -> tuple[list[int], list[Floats]]:
    """The likeliest token after each, beginning with the prompt's last, and the logits that it was chosen from."""
    engine, tokens, seen = model.engine, [], []
    engine.truncate(0, 0)
    logits = engine.prefill(prompt)
    for _ in range(_ANSWER):
        seen.append(np.array(logits, np.float32))
        tokens.append(int(np.argmax(logits)))
        if len(prompt) + len(tokens) >= engine.context:
            break
        logits = engine.decode(tokens[-1])
    return tokens, seen


def _row(written: Written, name: str, setting: str, truth: _Truth) -> Row:
    started = time.perf_counter()
    settings = _exact(name) if setting == "exact" else {}
    try:
        model = load(written.folder, name, ov_config=settings)
        found = model.logits(truth.prompt)
        tokens, _ = _greedy(model, truth.prompt)
    except (LowbitError, RuntimeError) as error:
        return Row(name, setting, error=str(error))
    largest = float(np.abs(truth.logits).max()) or 1.0
    same = next((i for i, (a, b) in enumerate(zip(truth.tokens, tokens, strict=False)) if a != b), len(truth.tokens))
    return Row(
        name,
        setting,
        float(np.abs(found - truth.logits).max()) / largest,
        divergence(truth.logits, found),
        same,
        len(truth.tokens),
        same < len(truth.tokens) and _is_tie(truth.gaps[same], truth.tokens[same], tokens[same]),
        seconds=time.perf_counter() - started,
    )


def _is_tie(logits: Floats, one: int, other: int) -> bool:
    """Whether the source itself finds two tokens nearly alike."""
    return float(abs(logits[one] - logits[other])) <= 2 * EXACT_LIMIT * float(np.abs(logits).max())


def _exact(name: str) -> Mapping[str, str]:
    """Those of the exact settings that a device has."""
    known = {str(prop) for prop in core().get_property(name, "SUPPORTED_PROPERTIES")}
    return {key: value for key, value in EXACT.items() if key in known}
