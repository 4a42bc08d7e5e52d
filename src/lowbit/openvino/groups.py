"""A group size that does not divide the inputs of a weight, by one rule for graphs and for folders.

The size becomes the largest that divides both, down to 32. Below that the scales would take what the codes save (groups of 1 are
larger than 16 bits), so the weight has 8 bits with a scale for each row, and one line says how many do. Where that would be all of
them, nothing in the result is what was asked for, and it is refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence

from lowbit.errors import RecipeError
from lowbit.formats import Format, format_from_name
from lowbit.models.spec import DecoderSpec
from lowbit.recipe import Recipe
from lowbit.runtime.files import RECIPE_ROLES

LEAST = 32
_BYTE = 8


def fitting(size: int, in_features: int, least: int = LEAST) -> int | None:
    """The size of groups in a row of so many inputs; None where none of at least `least` divides it."""
    if size <= 0 or in_features % size == 0:
        return size
    found = math.gcd(size, in_features)
    return found if found >= least else None


def remark(size: int, odd: Sequence[str], count: int, least: int = LEAST) -> str:
    """The line about weights that have 8 bits; raises where they are all."""
    if len(odd) == count:
        raise RecipeError(
            f"no group of {size} inputs, nor of a part of them down to {least}, divides any of the {count} products: take "
            "another group size, or 8 bits"
        )
    return (
        f"{len(odd)} of {count} products have 8 bits, since no part of {size} inputs down to {least} divides their rows: "
        f"{', '.join(odd[:3])}{', ...' if len(odd) > 3 else ''}"
    )


def fitted(recipe: Recipe, spec: DecoderSpec, backup: str) -> tuple[Recipe, list[str]]:
    """A recipe whose groups divide every product of a model, and what is to be said about it."""
    changes: list[tuple[str, Format | None]] = []
    odd, count, asked = [], 0, recipe.linear.group_size
    for path, in_features in _products(spec):
        formats = recipe.choose(path, "linear").formats
        if len(formats) != 1 or not _has_free_groups(formats[0]):
            continue
        count += 1
        format = formats[0]
        size = fitting(format.group_size, in_features)
        if size is None:
            odd.append(path)
            changes.append((f"^{re.escape(path)}$", format_from_name(backup)))
        elif size != format.group_size and format.group_size < in_features:
            changes.append((f"^{re.escape(path)}$", format.with_group(size)))
    notes = [remark(asked, odd, count)] if odd else []
    return recipe.replace(overrides=(*changes, *recipe.overrides)) if changes else recipe, notes


def _has_free_groups(format: Format) -> bool:
    """Whether a format's groups may have another size."""
    fixed = format.block is not None or format.scale_dtype == "e8m0" or format.has_global_scale
    return not fixed and format.bits < _BYTE and format.group_size > 0


def _products(spec: DecoderSpec) -> Iterator[tuple[str, int]]:
    for layer in range(len(spec.layers)):
        for weight in spec.layer_weights(layer):
            if RECIPE_ROLES.get(weight.role) in ("linear", "experts"):
                yield weight.name.format(layer=layer).removesuffix(".weight"), weight.shape[-1]
