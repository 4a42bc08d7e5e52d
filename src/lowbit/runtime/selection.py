"""Which token comes next: the settings, and the choice by the core.

The settings carry the names and the meaning of transformers' generate, and give the same distribution; presence and frequency
penalties are those of the chat servers. temperature 0 (the default) is greedy. Draws come from a generator of 64 bits seeded by
`seed`, so the same seed gives the same text on every machine whose logits agree.
"""

from __future__ import annotations

import ctypes
import math
import os
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowbit.core.library import check, library
from lowbit.errors import RecipeError, nearest

Floats = NDArray[np.float32]
Tokens = NDArray[np.int32]


class CSelection(ctypes.Structure):
    """`lowbit_selection` of select_api.h."""

    _fields_ = [
        ("temperature", ctypes.c_float),
        ("top_k", ctypes.c_int32),
        ("top_p", ctypes.c_float),
        ("min_p", ctypes.c_float),
        ("typical_p", ctypes.c_float),
        ("repetition_penalty", ctypes.c_float),
        ("presence_penalty", ctypes.c_float),
        ("frequency_penalty", ctypes.c_float),
        ("bias_count", ctypes.c_int32),
        ("bias_tokens", ctypes.c_void_p),
        ("bias_values", ctypes.c_void_p),
        ("word_count", ctypes.c_int32),
        ("word_ends", ctypes.c_void_p),
        ("word_tokens", ctypes.c_void_p),
        ("banned_count", ctypes.c_int32),
        ("banned_tokens", ctypes.c_void_p),
    ]


@dataclass(frozen=True)
class Selection:
    """How tokens are chosen."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    bias: dict[int, float] = field(default_factory=dict)
    forbidden: tuple[tuple[int, ...], ...] = ()
    min_new_tokens: int = 0
    seed: int | None = None

    def __post_init__(self) -> None:
        check_numbers(self)
        limits = {
            "temperature": 0 <= self.temperature < math.inf,
            "top_k": self.top_k >= 0,
            "top_p": 0 < self.top_p <= 1,
            "min_p": 0 <= self.min_p <= 1,
            "typical_p": 0 < self.typical_p <= 1,
            "repetition_penalty": 0 < self.repetition_penalty < math.inf,
            "presence_penalty": math.isfinite(self.presence_penalty),
            "frequency_penalty": math.isfinite(self.frequency_penalty),
            "bias": all(x < math.inf for x in self.bias.values()),  # which no NaN is
            "min_new_tokens": self.min_new_tokens >= 0,
        }
        for name, holds in limits.items():
            if not holds:
                raise RecipeError(f"{name}={getattr(self, name)} is out of range; {_RANGES[name]}")
        if not all(self.forbidden):
            raise RecipeError("a forbidden sequence without tokens is out of range; use one token or more")

    @classmethod
    def from_generation_config(cls, config: dict[str, Any]) -> Selection:
        """The settings of a generation_config.json: greedy unless it samples."""
        names = {f.name for f in fields(cls)}
        values = {key: value for key, value in config.items() if key in names and value is not None}
        if config.get("do_sample"):
            values.setdefault("temperature", 1.0)
            values.setdefault("top_k", 50)
        else:
            for name in ("temperature", "top_k", "top_p", "min_p", "typical_p"):
                values.pop(name, None)
        return cls(**values)

    def replace(self, **changes: Any) -> Selection:
        names = {f.name for f in fields(self)}
        for name in changes:
            if name not in names:
                raise RecipeError(f"there is no setting {name!r}: {nearest(name, names)}")
        return Selection(**{f.name: getattr(self, f.name) for f in fields(self)} | changes)


def check_numbers(settings: Any) -> None:
    """Refuse what is no number in the fields of a dataclass of settings that want one."""
    for each in fields(settings):
        value, kind = getattr(settings, each.name), str(each.type)
        wanted = _NUMBERS.get(kind.removesuffix(" | None"))
        if wanted is not None and not isinstance(value, wanted[0]) and not (value is None and kind.endswith("None")):
            raise RecipeError(f"{each.name}={value!r} is out of range; use {wanted[1]}")


_NUMBERS = {"int": (Integral, "a whole number"), "float": (Real, "a number")}
_RANGES = {
    "temperature": "use 0 for greedy, or a number above it",
    "top_k": "use 0 for off, or the number of tokens to keep",
    "top_p": "use a share above 0 and at most 1",
    "min_p": "use a share between 0 and 1",
    "typical_p": "use a share above 0 and at most 1",
    "repetition_penalty": "use 1 for off, or a number above 0",
    "presence_penalty": "use 0 for off, or a finite number",
    "frequency_penalty": "use 0 for off, or a finite number",
    "bias": "use numbers, or -inf for a token that must not come",
    "min_new_tokens": "use 0 for off, or a number of tokens",
}


class Selector:
    """Chooses the tokens of one sequence: the settings as the core reads them, and the generator of its draws."""

    def __init__(self, selection: Selection, stop_tokens: tuple[int, ...] = ()) -> None:
        self.selection = selection
        seed = selection.seed if selection.seed is not None else int.from_bytes(os.urandom(8)) >> 1
        self.generator = ctypes.c_uint64(seed)
        self.chosen = 0
        self._bans = len(stop_tokens)
        words = selection.forbidden
        # What the struct points to, made once: a call costs 4 microseconds, and building it again cost 40.
        self._kept = [
            np.fromiter(selection.bias, np.int32, len(selection.bias)),
            np.fromiter(selection.bias.values(), np.float32, len(selection.bias)),
            np.cumsum([len(word) for word in words], dtype=np.int32),
            np.asarray([token for word in words for token in word], np.int32),
            np.asarray(stop_tokens, np.int32),
        ]
        tokens, values, ends, flat, stops = (array.ctypes.data for array in self._kept)
        s = selection
        self._settings = CSelection(
            s.temperature, s.top_k, s.top_p, s.min_p, s.typical_p, s.repetition_penalty, s.presence_penalty,
            s.frequency_penalty, len(s.bias), tokens, values, len(words), ends, flat, 0, stops,
        )  # fmt: skip

    @property
    def address(self) -> int:
        """Where the core reads the settings."""
        return ctypes.addressof(self._settings)

    def choose(self, logits: Floats, history: Tokens) -> int:
        """The next token; `history` are all tokens so far."""
        token = ctypes.c_int32()
        arguments = self._arguments(logits, history, self.chosen)
        check(library().lowbit_select(*arguments, ctypes.byref(self.generator), ctypes.byref(token), None))
        self.chosen += 1
        return int(token.value)

    def probabilities(self, logits: Floats, history: Tokens) -> Floats:
        """The distribution that `choose` draws from."""
        result = np.empty(len(logits), np.float32)
        arguments = self._arguments(logits, history, self.chosen)
        check(library().lowbit_probabilities(*arguments, result.ctypes.data))
        return result

    def adjust_(self, scores: Floats, history: Tokens, made: int) -> None:
        """Biases, penalties and what is forbidden after `made` new tokens, on a row of scores in place."""
        check(library().lowbit_adjust(*self._arguments(scores, history, made)))

    def _arguments(self, logits: Floats, history: Tokens, made: int) -> tuple[Any, ...]:
        self._logits = np.ascontiguousarray(logits, np.float32)
        self._history = np.ascontiguousarray(history, np.int32)
        self._settings.banned_count = self._bans if made < self.selection.min_new_tokens else 0
        return (
            self._logits.ctypes.data,
            len(self._logits),
            ctypes.byref(self._settings),
            self._history.ctypes.data,
            len(self._history),
        )
