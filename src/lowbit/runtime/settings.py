"""How an answer is made: how long, where it stops, how each token is chosen, and by which search.

`Settings` is frozen. A model has its own (from generation_config.json), and a call changes some of them by name:
`settings.change(max_new_tokens=20, temperature=0.7)`. Names are those of transformers' generate where it has them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from dataclasses import replace as replace_fields
from typing import Any, Literal

from lowbit.errors import RecipeError, nearest
from lowbit.runtime.selection import Selection, check_numbers

# Settings that mean nothing unless tokens are drawn; naming one of them means: draw.
_DRAWING = ("top_k", "top_p", "min_p", "typical_p")
_DEFAULT_NEW_TOKENS = 256


@dataclass(frozen=True)
class BeamSettings:
    """Beam search: keep the `num_beams` likeliest texts instead of one.

    A finished text of n tokens scores log probability / n^length_penalty. With `early_stopping` True the search ends
    once enough texts are finished, with False once no text under way can win at its present length, with "never" at
    any length. Groups of beams search one after another, each losing `diversity_penalty` for a token as often as the
    groups before chose it at this step.
    """

    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    num_beam_groups: int = 1
    diversity_penalty: float = 0.0
    num_return_sequences: int = 1

    def __post_init__(self) -> None:
        check_numbers(self)
        for name in ("length_penalty", "diversity_penalty"):
            if not math.isfinite(getattr(self, name)):
                raise RecipeError(f"{name}={getattr(self, name)} is out of range; use a finite number")
        if self.num_beams < 1 or self.num_beam_groups < 1 or self.num_beams % self.num_beam_groups:
            raise RecipeError(
                f"{self.num_beams} beams do not divide into {self.num_beam_groups} groups: use a multiple of the groups"
            )
        if self.early_stopping not in (True, False, "never"):
            raise RecipeError(f"early_stopping={self.early_stopping!r} is unknown; use True, False or 'never'")
        if not 1 <= self.num_return_sequences <= self.num_beams:
            raise RecipeError(
                f"num_return_sequences={self.num_return_sequences} is out of range; use 1 to num_beams={self.num_beams}"
            )


@dataclass(frozen=True)
class Settings:
    """Everything about an answer but its prompt. `check` looks for NaN after every stage, to name the layer that makes it;
    `within_window` refuses a prompt longer than the model's sliding window, whose beginning layers with one would not see."""

    max_new_tokens: int = _DEFAULT_NEW_TOKENS
    stop: tuple[str, ...] = ()
    stop_tokens: tuple[int, ...] = ()
    ignore_end: bool = False
    log_probabilities: int | None = None
    prompt_lookup_num_tokens: int = 0
    num_assistant_tokens: int = 5
    check: bool = False
    within_window: bool = False
    selection: Selection = field(default_factory=Selection)
    beams: BeamSettings = field(default_factory=BeamSettings)

    def __post_init__(self) -> None:
        check_numbers(self)
        least = {"max_new_tokens": 1, "prompt_lookup_num_tokens": 0, "num_assistant_tokens": 1}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise RecipeError(f"{name}={getattr(self, name)} is out of range; use a number from {low} up")
        if self.log_probabilities is not None and self.log_probabilities < 0:
            raise RecipeError(
                f"log_probabilities={self.log_probabilities} is out of range; use the number of tokens to list"
            )
        if any(not stop for stop in self.stop):
            raise RecipeError("an empty stop string would stop every answer before its first token")

    @property
    def ends(self) -> tuple[int, ...]:
        """The tokens that end an answer."""
        return () if self.ignore_end else self.stop_tokens

    def change(self, **changes: Any) -> Settings:
        """The same settings but for some, by name; those of the selection and of the beams are found where they are."""
        if isinstance(changes.get("stop"), str):
            changes["stop"] = (changes["stop"],)
        if isinstance(changes.get("stop_tokens"), int):
            changes["stop_tokens"] = (changes["stop_tokens"],)
        for name in ("stop", "stop_tokens"):
            if changes.get(name) is not None:
                changes[name] = tuple(changes[name])
        selection = self.selection.replace(**_drawn(self.selection, _pick(changes, Selection)))
        beams = replace_fields(self.beams, **_pick(changes, BeamSettings))
        own = {f.name for f in fields(self)}
        for name in changes:
            if name not in own:
                known = [*own, *_names(Selection), *_names(BeamSettings)]
                raise RecipeError(f"there is no setting {name!r}: {nearest(name, known)}")
        given = {name: value for name, value in changes.items() if value is not None or name == "log_probabilities"}
        return replace_fields(replace_fields(self, selection=selection, beams=beams), **given)


def _names(kind: type) -> list[str]:
    return [f.name for f in fields(kind)]


def _pick(changes: dict[str, Any], kind: type) -> dict[str, Any]:
    """Take the fields of a class out of the changes; None means: as it is."""
    names = [*_names(kind), "do_sample"] if kind is Selection else _names(kind)
    picked = {name: changes.pop(name) for name in names if name in changes}
    return {name: value for name, value in picked.items() if value is not None}


def _drawn(selection: Selection, changes: dict[str, Any]) -> dict[str, Any]:
    """Changes with a temperature: naming a filter means to draw, unless a temperature is named too."""
    sample = changes.pop("do_sample", None)
    if sample is False:
        return changes | {"temperature": 0.0}
    wants = sample or any(name in changes for name in _DRAWING)
    if wants and "temperature" not in changes and selection.temperature == 0:
        changes["temperature"] = 1.0
    return changes


def settings_from(config: Mapping[str, Any], ends: tuple[int, ...] = ()) -> Settings:
    """The settings of a generation_config.json; `ends` are the end tokens that the model's config knows."""
    stored = config.get("eos_token_id")
    stop_tokens = tuple(stored) if isinstance(stored, list) else (stored,) if stored is not None else ends
    known = {name: config[name] for name in _names(BeamSettings) if config.get(name) is not None}
    selection = Selection.from_generation_config(dict(config))
    words = tuple(tuple(word) for word in config.get("bad_words_ids") or ())
    if words:
        selection = selection.replace(forbidden=words)
    return Settings(
        config.get("max_new_tokens") or _DEFAULT_NEW_TOKENS,
        stop_tokens=stop_tokens,
        selection=selection,
        beams=BeamSettings(**known),
    )
