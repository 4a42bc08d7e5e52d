"""The keywords that say how a model is packed, the same for a model that is there and for one that is being loaded."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lowbit.errors import RecipeError, nearest
from lowbit.formats import CASTS, Format, as_format
from lowbit.recipe import Recipe, recipe_named

# Keywords of the older systems that mean nothing here, with the reason that the warning gives.
_OBSOLETE = {
    "disable_optimize_pre": "there is no separate first pass to leave out",
    "lightweight_bmm": "attention is left to the model",
    "replace_embedding": "use cpu_embedding",
}


@dataclass(frozen=True)
class Choices:
    """Everything that can be said about how a model is packed beyond its format. The command line shows the same fields."""

    recipe: Recipe | str | None = None
    rounder: str | None = None
    scaler: str | None = None
    head: str | Format | None = None
    embedding: str | Format | None = None
    conv: str | Format | None = None
    kernel: str | None = None
    compute: str = "auto"
    torch_dtype: torch.dtype | str | None = None
    progress: bool | None = None
    calibration: Any = None
    resume: str | Path | None = None
    spill: str | Path | None = None


CHOICES = tuple(Choices.__dataclass_fields__)


def known_keywords(given: dict[str, Any], caller: str) -> dict[str, Any]:
    """The keywords that are fields of `Choices`; each other one is warned about by name."""
    known = {}
    for name, value in given.items():
        name = "torch_dtype" if name == "dtype" else name
        if name in CHOICES:
            known[name] = value
        else:
            reason = _OBSOLETE.get(name) or nearest(name, CHOICES)
            warnings.warn(f"{caller} does not know the keyword {name!r} and ignores it: {reason}", stacklevel=3)
    return known


def cast_of(low_bit: str | Format | None, choices: Choices) -> torch.dtype | None:
    """The dtype that a name such as `bf16` casts to, or None where it names a format."""
    if isinstance(low_bit, str) and low_bit.strip().lower() in CASTS and choices.recipe is None:
        return as_dtype(CASTS[low_bit.strip().lower()])
    return None


def refuse_idle_data(choices: Choices, imatrix: Any = None) -> None:
    """Refuse what rounding looks at where nothing is rounded."""
    if choices.calibration is not None or imatrix is not None:
        name = "imatrix" if choices.calibration is None else "calibration"
        raise RecipeError(f"{name}= says what rounding looks at, and nothing is rounded: name a format or recipe= too")


def as_dtype(value: torch.dtype | str | None) -> torch.dtype:
    found = value if isinstance(value, torch.dtype) else getattr(torch, str(value).removeprefix("torch."), None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise RecipeError(
            f"{value!r} is no floating point type that a model could compute in; use float32, bfloat16 or float16"
        )
    return found


def build_recipe(
    low_bit: str | Format | None, modules_to_not_convert: list[str] | str | None, cpu_embedding: bool, choices: Choices
) -> Recipe:
    """The recipe that the keywords of optimize_model and from_pretrained add up to."""
    recipe = recipe_named(choices.recipe if choices.recipe is not None else "int4" if low_bit is None else low_bit)
    changes: dict[str, Any] = {}
    for role in ("head", "embedding", "conv"):
        wanted = getattr(choices, role)
        if wanted is not None:
            changes[role] = as_format(wanted)
    for kind in ("rounder", "scaler"):
        if getattr(choices, kind):
            changes[kind] = getattr(choices, kind)
    if cpu_embedding:
        changes["embedding"] = None
    if modules_to_not_convert:
        names = [modules_to_not_convert] if isinstance(modules_to_not_convert, str) else list(modules_to_not_convert)
        wrong = next((name for name in names if not isinstance(name, str) or not name), None)
        if wrong is not None:
            raise RecipeError(f"modules_to_not_convert holds {wrong!r}: name modules by a part of their path, as text")
        changes["skip"] = (*recipe.skip, *names)
    return recipe.replace(**changes) if changes else recipe
