"""Does the exported folder answer as its source? Logits and greedy tokens, on every device that is here.

    exact      nothing rounded that need not be: f32 throughout. The graph must give the source's numbers: this passes or fails
    default    as the device likes it (bf16, activations in 8 bits, keys and values in 8 bits): how far that moves the answers

The source is run by lowbit's own engine, in f32, over the same codes (a module that was followed runs itself). Where plain
weights were rounded by the export a line more says what the rounding itself moved, against the plain source. Divergence is
KL(source || folder), the mean over the tokens of a text; a first difference of greedy tokens that the source itself finds
nearly even is a tie and no failure.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from lowbit.errors import LowbitError
from lowbit.openvino.export import Written
from lowbit.openvino.library import core, device, devices
from lowbit.openvino.native.rows import Decoder, Rows, check_graph
from lowbit.openvino.opening import EXACT, compile_model, read_model
from lowbit.recipe import Recipe
from lowbit.runtime.files import ModelFiles, read_tokenizer
from lowbit.runtime.loading import load_files

TEXT = (
    "The museum opened in 1897 and was closed for 12 years during the war. When it was opened again, 3,400 people came on "
    'the first day alone; most of them had walked, for there was no other way. "We did not expect that," its director said.'
)
_PROMPT, _ANSWER = 48, 32
# Of the largest logit: f32 products summed in another order differ by 1e-6 to 1e-5 after thirty layers.
EXACT_LIMIT = 1e-3
# The same where the source is a low-bit module, which rounds what its layers are given to 8 bits.
_ROUNDED_LIMIT = 5e-2
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
    limit: float = EXACT_LIMIT
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        if self.error or not np.isfinite(self.difference):
            return False
        if self.setting == "exact":
            return self.difference <= self.limit and (self.same == self.tokens or self.tie)
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
    source = _Followed(written.model) if written.model is not None else _Engine(written.files, written.recipe)
    truth = _Truth(prompt, source.logits(prompt), *_greedy(source, prompt))
    del source
    gc.collect()
    rounding = None
    if written.recipe is not None and written.model is None:
        rounding = divergence(_Engine(written.files, None).logits(prompt), truth.logits)
        gc.collect()
    exact = EXACT_LIMIT if written.model is None or not written.report.layers else _ROUNDED_LIMIT
    rows = [_row(written.folder, name, setting, truth, exact) for name in chosen for setting in ("exact", "default")]
    return Verification(tuple(rows), rounding)


class _Reader(Protocol):
    """Something that reads tokens: a prompt, which begins anew, and one after another from there."""

    def logits(self, prompt: list[int]) -> Floats: ...
    def next(self, token: int) -> Floats: ...


class _Engine:
    """The source in lowbit's engine, in f32."""

    def __init__(self, files: ModelFiles, recipe: Recipe | None) -> None:
        self._engine = load_files(files, recipe, cache="fp32", compute="fp32").engine

    def logits(self, prompt: list[int]) -> Floats:
        self._engine.truncate(0, 0)
        return self._engine.logits(prompt)

    def next(self, token: int) -> Floats:
        return self._engine.decode(token)


class _Followed:
    """A source that was followed for one call: the module itself."""

    def __init__(self, model: Any) -> None:
        self._model, self._past = model, None

    def logits(self, prompt: list[int]) -> Floats:
        self._past = None
        return self._read(prompt)

    def next(self, token: int) -> Floats:
        found: Floats = self._read([token])[0]
        return found

    def _read(self, tokens: list[int]) -> Floats:
        import torch  # the module is its

        with torch.no_grad():
            found = self._model(torch.tensor([tokens]), past_key_values=self._past, use_cache=True)
        self._past = found.past_key_values
        return np.asarray(found.logits[0].float().numpy())


class _Graph:
    """The folder on a device."""

    def __init__(self, folder: Path, name: str, settings: Mapping[str, str]) -> None:
        graph = read_model(folder)
        check_graph(graph)
        self._decoder = Decoder.of(graph, compile_model(graph, name, settings))
        self._rows = Rows(self._decoder)

    def logits(self, prompt: list[int]) -> Floats:
        self._rows = Rows(self._decoder)
        return np.array(self._rows.read(np.array([prompt], np.int64))[0])

    def next(self, token: int) -> Floats:
        return np.array(self._rows.read(np.array([[token]], np.int64))[0, 0])


def divergence(expected: Floats, found: Floats) -> float:
    """KL(expected || found), the mean over tokens, in nats."""
    p, q = (_log_softmax(logits) for logits in (expected, found))
    return float((np.exp(p) * (p - q)).sum(-1).mean())


def _log_softmax(logits: Floats) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))


def _prompt(written: Written) -> list[int]:
    config = written.files.config
    longest = int(config.get("max_position_embeddings") or config.get("n_positions") or 2048)
    longest = longest if written.spec is None else written.spec.max_positions
    room = max(2, min(_PROMPT, longest - _ANSWER))
    tokenizer = read_tokenizer(written.folder)
    if tokenizer is not None:
        return tokenizer.encode(TEXT)[:room]
    size = int(config["vocab_size"]) if written.spec is None else written.spec.vocab_size
    return [int(token) for token in np.random.default_rng(0).integers(0, size, room)]


def _greedy(reader: _Reader, prompt: list[int]) -> tuple[list[int], list[Floats]]:
    """The likeliest token after each, beginning with the prompt's last, and the logits that it was chosen from."""
    tokens, seen = [], [np.array(reader.logits(prompt)[-1], np.float32)]
    for _ in range(_ANSWER):
        tokens.append(int(np.argmax(seen[-1])))
        if len(tokens) < _ANSWER:
            seen.append(np.array(reader.next(tokens[-1]), np.float32))
    return tokens, seen


def _row(folder: Path, name: str, setting: str, truth: _Truth, exact: float) -> Row:
    started = time.perf_counter()
    try:
        graph = _Graph(folder, name, _exact(name) if setting == "exact" else {})
        found = graph.logits(truth.prompt)
        tokens, _ = _greedy(graph, truth.prompt)
    except (LowbitError, RuntimeError) as error:
        return Row(name, setting, error=str(error))
    largest = float(np.abs(truth.logits).max()) or 1.0
    same = next((i for i, (a, b) in enumerate(zip(truth.tokens, tokens, strict=True)) if a != b), len(tokens))
    tie = same < len(tokens) and _is_tie(truth.gaps[same], truth.tokens[same], tokens[same], exact)
    return Row(
        name,
        setting,
        float(np.abs(found - truth.logits).max()) / largest,
        divergence(truth.logits, found),
        same,
        len(tokens),
        tie,
        limit=exact,
        seconds=time.perf_counter() - started,
    )


def _is_tie(logits: Floats, one: int, other: int, limit: float) -> bool:
    """Whether the source itself finds two tokens nearly alike."""
    return float(abs(logits[one] - logits[other])) <= 2 * limit * float(np.abs(logits).max())


def _exact(name: str) -> Mapping[str, str]:
    """Those of the exact settings that a device has."""
    known = {str(prop) for prop in core().get_property(name, "SUPPORTED_PROPERTIES")}
    return {key: value for key, value in EXACT.items() if key in known}
