"""Does the exported folder answer as its source? Logits and greedy tokens, on every device that is here.

    exact      nothing rounded that need not be: f32 throughout. The graph must give the source's numbers: this passes or fails
    default    as the device likes it (bf16, activations in 8 bits, keys and values in 8 bits): how far that moves the answers

An exact answer is the folder's own, token by token. By default the folder chooses a token behind each of the source's answer:
the first of them are read at once and the last ones one by one, since the two ways take other code on a device.

The source is run by lowbit's own engine, in f32, over the same codes (a module that was followed runs itself). Where plain
weights were rounded by the export a line more says what the rounding itself moved, against the plain source. Divergence is
KL(source || folder), the mean over the tokens of a text (by default with those of the answer); a first difference of greedy
tokens that the source itself finds nearly even is a tie and no failure.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowbit.errors import LowbitError
from lowbit.models.past import name_of_past, past_of
from lowbit.openvino.export import Written
from lowbit.openvino.library import core, device, devices
from lowbit.openvino.native.rows import Decoder, Rows, check_graph
from lowbit.openvino.opening import EXACT, compile_model, read_model
from lowbit.runtime.engine import Engine
from lowbit.runtime.files import Loaded, read_tokenizer, read_weights
from lowbit.runtime.loading import lay_out
from lowbit.runtime.stages import staged_logits

TEXT = (
    "The museum opened in 1897 and was closed for 12 years during the war. When it was opened again, 3,400 people came on "
    'the first day alone; most of them had walked, for there was no other way. "We did not expect that," its director said.'
)
_PROMPT, ANSWER = 48, 32
# Of the source's answer, tokens that a folder reads at once. Those behind them cost a core 80 ms each at a billion weights.
_AT_ONCE = 24
SETTINGS = ("exact", "default")
# Of the largest logit: f32 products summed in another order differ by 1e-6 to 1e-5 after thirty layers.
EXACT_LIMIT = 1e-3
# The same where the source is a low-bit module, which rounds what its layers are given to 8 bits.
ROUNDED_LIMIT = 5e-2
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
        return all(row.passed for row in self.rows) and (self.rounding is None or bool(np.isfinite(self.rounding)))


def told(found: Verification) -> list[str]:
    """A line for each row, and one for the rounding."""
    lines = [_line(row) for row in found.rows]
    if found.rounding is not None:
        lines.append(f"the rounding itself moves answers by a divergence of {found.rounding:.4f}")
    return lines


def _line(row: Row) -> str:
    verdict = "as the source" if row.passed else "FAILED"
    if row.error:
        return f"{row.device}, {row.setting}: {verdict}: {row.error}"
    tokens = f", {row.same} of {row.tokens} tokens alike{' (a tie)' if row.tie else ''}" if row.tokens else ""
    away = f"{row.difference:.1e} away, divergence {row.divergence:.5f}"
    return f"{row.device}, {row.setting}: {verdict}; {away}{tokens}"


@dataclass(frozen=True)
class _Truth:
    """What the source says: logits after each token of a text, its greedy answer, and the logits that each was chosen from."""

    logits: Floats
    tokens: list[int]
    gaps: Floats


@dataclass(frozen=True)
class _Answer:
    """What a folder says on a device: the same, or why it says nothing."""

    device: str
    setting: str
    logits: Floats | None = None
    tokens: tuple[int, ...] = ()
    gaps: Floats | None = None  # behind the source's tokens
    error: str = ""
    seconds: float = 0.0


def verify(written: Written, on: Iterable[str] | None = None) -> Verification:
    """Compare an exported folder with its source, on the devices named or on all that are here."""
    chosen = devices() if on is None else [device(name) for name in on]
    prompt = _prompt(written)
    settings = [
        (name, setting, exact_settings(name) if setting == "exact" else {}) for name in chosen for setting in SETTINGS
    ]
    # A device makes a model ready on one core, mostly; the source runs on the other one meanwhile.
    beside = ThreadPoolExecutor(1, "lowbit-verify")
    known: Future[_Truth] = Future()
    questions = [_Question(written.folder, prompt, *setting, known) for setting in settings]
    try:
        asked = [beside.submit(question.ask) for question in questions]
        plain = _plain(written, prompt)
        truth = _truth(written, prompt, asked[0].result().tokens if asked else ())
        known.set_result(truth)
        rounding = None if plain is None else divergence(plain, truth.logits)
        exact = EXACT_LIMIT if written.model is None or not written.report.layers else ROUNDED_LIMIT
        return Verification(tuple(_row(answer.result(), truth, exact) for answer in asked), rounding)
    finally:
        known.cancel()  # nobody waits for what will not come
        for question in questions:
            question.give_up()
        beside.shutdown(cancel_futures=True)


def rounding_of(written: Written) -> float | None:
    """KL(source || folder) on the first device, of a folder whose graph was rounded after it was written."""
    if written.spec is None:
        return None
    prompt, name = _prompt(written), devices()[0]
    answer = _Question(written.folder, prompt, name, SETTINGS[0], exact_settings(name)).ask()
    if answer.logits is None:
        raise LowbitError(f"the graph that was rounded does not run on {name}: {answer.error}")
    return divergence(_Source(written).logits(prompt), answer.logits)


def _plain(written: Written, prompt: list[int]) -> Floats | None:
    """What the source said before the export rounded it; None where it did not."""
    if written.recipe is None or written.spec is None:
        return None
    return staged_logits(read_weights(written.files, written.spec), written.spec, prompt)


def _truth(written: Written, prompt: list[int], guess: Sequence[int]) -> _Truth:
    """The source's greedy answer, with the folder's as a guess.

    One pass over the prompt and the guess says what the source puts behind each token. As far as that is the guess, the guess is
    its greedy answer: what was read is what it would have read. From the first difference on it goes its own way, token by token.
    """
    source = _Followed(written.model) if written.model is not None else _Source(written)
    found = source.logits([*prompt, *guess[: ANSWER - 1]])
    gaps = found[len(prompt) - 1 :]
    tokens = [int(token) for token in gaps.argmax(-1)]
    same = alike(tokens, guess)
    if same < ANSWER - 1:
        tokens, gaps = tokens[: same + 1], gaps[: same + 1]
        more = source.follow([*prompt, *tokens], ANSWER - len(tokens))
        tokens, gaps = (
            [*tokens, *(int(row.argmax()) for row in more)],
            np.concatenate([gaps, *(row[None] for row in more)]),
        )
    return _Truth(found[: len(prompt)], tokens, gaps)


def alike(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens are the same before the first difference."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


class _Source:
    """The source in lowbit's engine, in f32, over the codes that were written: those kept, or the source's own."""

    def __init__(self, written: Written) -> None:
        assert written.spec is not None, "a model that was followed runs itself"
        self._written, self._spec = written, written.spec

    def logits(self, tokens: list[int]) -> Floats:
        return staged_logits(self._weights(), self._spec, tokens)

    def follow(self, tokens: list[int], count: int) -> list[Floats]:
        """The logits after some tokens, and after each of the likeliest that follow."""
        ready = lay_out(self._weights(), self._spec)
        # No more context than is asked for: keys and values of the longest one would take as much room as the weights.
        with Engine(self._spec, ready, len(tokens) + count, cache="fp32", compute="fp32") as engine:
            seen = [engine.prefill(tokens)][:count]
            while len(seen) < count:
                seen.append(engine.decode(int(seen[-1].argmax())))
        return seen

    def _weights(self) -> Iterable[Loaded]:
        self._written.files.check()
        if self._written.kept is not None:
            return self._written.kept
        return read_weights(self._written.files, self._spec, self._written.recipe)


class _Followed:
    """A source that was followed for one call: the module itself."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def logits(self, tokens: list[int]) -> Floats:
        return self._read(tokens, None)[0]

    def follow(self, tokens: list[int], count: int) -> list[Floats]:
        """The logits after some tokens, and after each of the likeliest that follow."""
        seen: list[Floats] = []
        past, given = None, tokens
        while len(seen) < count:
            found, past = self._read(given, past)
            seen.append(found[-1])
            given = [int(found[-1].argmax())]
        return seen

    def _read(self, tokens: list[int], past: Any) -> tuple[Floats, Any]:
        import torch  # the module is its

        with torch.no_grad():
            found = self._model(torch.tensor([tokens]), use_cache=True, **{name_of_past(self._model.forward): past})
        return np.asarray(found.logits[0].float().numpy()), past_of(found)


class _Graph:
    """The folder on a device."""

    def __init__(self, folder: Path, name: str, settings: Mapping[str, str]) -> None:
        graph = read_model(folder)
        check_graph(graph)
        self._rows = Rows(Decoder.of(graph, compile_model(graph, name, settings)))
        self._stopped = False

    def stop(self) -> None:
        """End the inference that runs, and let none follow; another thread may say so."""
        self._stopped = True
        self._rows.cancel()

    def read(self, tokens: Sequence[int]) -> Floats:
        """The logits behind each of some tokens, which go on with those read before."""
        if self._stopped:
            raise LowbitError("the comparison was given up")
        return np.array(self._rows.read(np.array([tokens], np.int64))[0])


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
    room = max(2, min(_PROMPT, longest - ANSWER))
    tokenizer = read_tokenizer(written.folder)
    if tokenizer is not None:
        return tokenizer.encode(TEXT)[:room]
    size = int(config["vocab_size"]) if written.spec is None else written.spec.vocab_size
    return [int(token) for token in np.random.default_rng(0).integers(0, size, room)]


@dataclass
class _Question:
    """What a folder says on a device: the logits after each token of a prompt, and the likeliest tokens that follow."""

    folder: Path
    prompt: list[int]
    device: str
    setting: str
    properties: Mapping[str, str]
    truth: Future[_Truth] | None = None
    graph: _Graph | None = None
    over: bool = False

    def ask(self) -> _Answer:
        started, gaps = time.perf_counter(), None
        try:
            self.graph = graph = _Graph(self.folder, self.device, self.properties)
            if self.over:
                graph.stop()
            logits = graph.read(self.prompt)
            if self.truth is not None and self.setting == "default":
                gaps = _behind(graph, logits[-1], self.truth.result().tokens)
                tokens = [int(row.argmax()) for row in gaps]
            else:
                tokens = [int(logits[-1].argmax())]
                while len(tokens) < ANSWER:
                    tokens.append(int(graph.read(tokens[-1:])[0].argmax()))
        except (LowbitError, RuntimeError) as error:
            return _Answer(self.device, self.setting, error=str(error))
        finally:
            self.graph = None
        del graph
        gc.collect()  # what a device holds of a model goes before it makes the next one ready
        return _Answer(self.device, self.setting, logits, tuple(tokens), gaps, seconds=time.perf_counter() - started)

    def give_up(self) -> None:
        """End an inference that runs, from another thread: a large model takes seconds for a prompt and its answer."""
        self.over = True  # before it looks: the graph may be there a moment later
        graph = self.graph
        if graph is not None:
            graph.stop()


def _behind(graph: _Graph, first: Floats, answer: Sequence[int]) -> Floats:
    """The logits that each token of an answer would be chosen from."""
    at_once = graph.read(answer[:_AT_ONCE])
    return np.concatenate([first[None], at_once, *(graph.read([token]) for token in answer[_AT_ONCE:-1])])


def _row(answer: _Answer, truth: _Truth, exact: float) -> Row:
    if answer.logits is None:
        return Row(answer.device, answer.setting, error=answer.error)
    largest = float(np.abs(truth.logits).max()) or 1.0
    same = alike(truth.tokens, answer.tokens)
    tie = same < ANSWER and is_tie(truth.gaps[same], truth.tokens[same], answer.tokens[same], exact)
    expected, found = truth.logits, answer.logits
    if answer.gaps is not None:
        expected, found = (np.concatenate(pair) for pair in ((expected, truth.gaps[1:]), (found, answer.gaps[1:])))
    return Row(
        answer.device,
        answer.setting,
        float(np.abs(found - expected).max()) / largest,
        divergence(expected, found),
        same,
        ANSWER,
        tie,
        limit=exact,
        seconds=answer.seconds,
    )


def is_tie(logits: Floats, one: int, other: int, limit: float) -> bool:
    """Whether the source itself finds two tokens nearly alike."""
    return float(abs(logits[one] - logits[other])) <= 2 * limit * float(np.abs(logits).max())


def exact_settings(name: str) -> Mapping[str, str]:
    """Those of the exact settings that a device has."""
    known = {str(prop) for prop in core().get_property(name, "SUPPORTED_PROPERTIES")}
    return {key: value for key, value in EXACT.items() if key in known}
