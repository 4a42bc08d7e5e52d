"""What an export makes of each weight: presets in the words of OpenVINO's users, and the share of weights with more bits.

    int8             every linear, the head and the embedding in 8 bits, a scale for each row
    int4, int4_g64   the linears in it (groups of 128 unless named); head and embedding in 8 bits, which plugins read packed too
    a Recipe         as it says

With a `ratio` below 1 that share of the linears' weights has the format, and the others, those whose rounding hurts most,
the 8 bits of the head. Which they are is found exactly (`allocate`), by |w - w^|^2 / |w|^2 of each weight.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import numpy as np

from lowbit.allocate import allocate
from lowbit.errors import RecipeError
from lowbit.formats import Format, as_format, format_from_name
from lowbit.models.spec import DecoderSpec
from lowbit.packing import PackedTensor
from lowbit.recipe import Recipe
from lowbit.runtime.files import RECIPE_ROLES, ModelFiles, read_weights, search_of
from lowbit.runtime.stored import Dense, dequantize, quantize_dense
from lowbit.search import Search

BACKUP = "int8_channel"
DEFAULT_GROUP = 128
# Above so many weights a model is exported in 8 bits unless something else is asked for, as OpenVINO's users know it.
LARGE = 1_000_000_000
_PRESETS = {"int8": BACKUP, "int4": f"int4_g{DEFAULT_GROUP}", "int4_asym": f"int4_asym_g{DEFAULT_GROUP}"}
_MODE, _BACKUP = "mode", "backup"


def export_recipe(name: str | Format | Recipe) -> Recipe:
    """The recipe that a preset, a format or a recipe stands for."""
    if isinstance(name, Recipe):
        return name
    format = as_format(_PRESETS.get(name, name) if isinstance(name, str) else name)
    backup = format if format.bits == 8 else format_from_name(BACKUP)
    return Recipe(format, head=backup, embedding=backup, name=format.name)


def beyond_ratio(counts: Mapping[str, int], errors: Mapping[str, tuple[float, float]], ratio: float) -> set[str]:
    """The weights that keep more bits: `errors` are those of the mode and of the backup, `counts` the numbers in each."""
    if not 0 <= ratio <= 1:
        raise RecipeError(f"a ratio of {ratio}; it is a share of the weights, from 0 to 1")
    sizes = {name: {_MODE: 0, _BACKUP: count} for name, count in counts.items()}
    costs = {name: dict(zip((_MODE, _BACKUP), pair, strict=True)) for name, pair in errors.items()}
    total = sum(counts.values())
    kept = allocate(sizes, costs, total - math.ceil(ratio * total - 0.5))
    return {name for name, option in kept.items() if option == _BACKUP}


def with_ratio(files: ModelFiles, spec: DecoderSpec, recipe: Recipe, ratio: float) -> Recipe:
    """The recipe with 8 bits where `ratio` leaves them. Reads every linear once."""
    backup, search = format_from_name(BACKUP), search_of(recipe)
    counts: dict[str, int] = {}
    errors: dict[str, tuple[float, float]] = {}
    for loaded in read_weights(files, spec):
        if RECIPE_ROLES.get(loaded.role) not in ("linear", "experts"):
            continue
        described = spec.weight(loaded.role)
        assert described is not None
        path = described.name.format(layer=loaded.layer).removesuffix(".weight")
        weight = dequantize(loaded.weight) if isinstance(loaded.weight, PackedTensor) else loaded.weight
        choice = recipe.choose(path, RECIPE_ROLES[loaded.role])
        if choice.formats and choice.formats[0].bits < backup.bits:
            counts[path] = math.prod(weight.shape)
            errors[path] = (_error(weight, choice.formats[0], search), _error(weight, backup, search))
    kept = sorted(beyond_ratio(counts, errors, ratio))
    exact = tuple((f"^{re.escape(path)}$", backup) for path in kept)
    return recipe.replace(
        overrides=(*exact, *recipe.overrides), name=f"{recipe.name or recipe.linear.name}, ratio {ratio:g}"
    )


def _error(weight: Dense, format: Format, search: Search) -> float:
    numbers = weight.float32()
    whole = float(np.square(numbers).sum())
    packed = quantize_dense(Dense(numbers, "float32"), format, search)
    return float(np.square(numbers - dequantize(packed).array).sum()) / whole if whole else 0.0
