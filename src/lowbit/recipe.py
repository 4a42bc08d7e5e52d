"""Recipe: what is done to a model, as a value that is saved with it.

A recipe gives each role a format (see `models.walk`), names the algorithm that rounds, and lists exceptions by path.
It is frozen, and `Recipe.from_dict(recipe.to_dict()) == recipe`. `recipe_named` turns what users type into one: a
recipe's name (`int4`), or the name of any format (`int3_g32`, `nf4`, `sym_int8`), which then holds for every linear
and for the head.
"""

from __future__ import annotations

import dataclasses
import re
import warnings
from dataclasses import dataclass, field
from typing import Any

from lowbit.errors import FormatError, RecipeError, nearest
from lowbit.formats import ALIASES, CASTS, IQ_STAND_IN, IQ_TYPES, MIXED, MIXTURES, Format, as_format
from lowbit.options import ROUNDER_OPTIONS, SCALER_OPTIONS, Options, options_for, options_from


@dataclass(frozen=True)
class Choice:
    """The formats that one weight may take (the one with the least error wins), or none and the reason.

    `note` is what the report adds to the line of a packed weight; `importance` [in] says how much each input matters.
    """

    formats: tuple[Format, ...] = ()
    reason: str = ""
    note: str = ""
    importance: Any = field(default=None, compare=False)


@dataclass(frozen=True)
class Recipe:
    """What to do to a model. A role without a format is left as it is. `notes` are remarks on paths, for the report.

    `scaler` may name an algorithm that scales the inputs of linears before the `rounder` chooses codes; the options of both
    are those of their class (`lowbit.options`), and its defaults where none are given.
    """

    linear: Format
    head: Format | None = None
    embedding: Format | None = None
    conv: Format | None = None
    rounder: str = "rtn"
    rounder_options: Options | None = None
    scaler: str = ""
    scaler_options: Options | None = None
    skip: tuple[str, ...] = ()
    overrides: tuple[tuple[str, Format | None], ...] = ()
    alternatives: tuple[Format, ...] = ()
    notes: tuple[tuple[str, str], ...] = ()
    name: str = ""

    def __post_init__(self) -> None:
        rounder_options = options_for("rounder", self.rounder, self.rounder_options, ROUNDER_OPTIONS)
        scaler_options = options_for("scaler", self.scaler, self.scaler_options, SCALER_OPTIONS)
        object.__setattr__(self, "rounder_options", rounder_options)
        object.__setattr__(self, "scaler_options", scaler_options)
        for pattern, _ in (*self.overrides, *self.notes):
            try:
                re.compile(pattern)
            except re.error as error:
                raise RecipeError(f"the pattern {pattern!r} is not a regular expression: {error}") from None

    @property
    def title(self) -> str:
        """What a report calls it: its name, and the algorithms that this does not say."""
        name = self.name or self.linear.name
        others = [self.rounder if self.rounder != "rtn" else "", f"after {self.scaler}" if self.scaler else ""]
        said = [text for text in others if text and text.removeprefix("after ") not in name.lower()]
        return ", ".join([name, *([" ".join(said)] if said else [])])

    @property
    def asks_for_data(self) -> bool:
        """Whether calibration tokens are needed."""
        needed = self.rounder_options is not None and self.rounder_options.data == "needed"
        return bool(self.scaler) or needed or self.fixed_format is not None

    @property
    def fixed_format(self) -> Format | None:
        """A format of this recipe that rounds activations to fixed ranges, which must be found."""
        formats = [self.linear, *self.alternatives, *(format for _, format in self.overrides)]
        return next((format for format in formats if format is not None and format.fixed_range), None)

    @property
    def uses_data(self) -> bool:
        """Whether calibration tokens change anything."""
        return self.asks_for_data or (self.rounder_options is not None and self.rounder_options.data == "used")

    def choose(self, path: str, role: str) -> Choice:
        """What becomes of the weight at a path."""
        for name in self.skip:
            if name and name in path:
                return Choice(reason=f"named in modules_to_not_convert ({name})")
        for pattern, format in self.overrides:
            if re.search(pattern, path):
                if format is None:
                    return Choice(reason=f"left out by the override {pattern!r}")
                return Choice((format,), note=self._note(path, besides=NOTES_OF_RECIPES))
        by_role = {"head": self.head, "embedding": self.embedding, "conv": self.conv}
        chosen = by_role.get(role, self.linear)
        if chosen is None:
            return Choice(reason=f"the recipe leaves every {role} in full precision")
        return Choice((chosen, *self.alternatives) if chosen == self.linear else (chosen,), note=self._note(path))

    def _note(self, path: str, besides: tuple[str, ...] = ()) -> str:
        """The first note on a path."""
        return next((note for pattern, note in self.notes if pattern not in besides and re.search(pattern, path)), "")

    def replace(self, **changes: Any) -> Recipe:
        """The same recipe with some fields changed. Another algorithm has its own options, the defaults if none are given."""
        for kind in ("rounder", "scaler"):
            if changes.get(kind, getattr(self, kind)) != getattr(self, kind):
                changes.setdefault(f"{kind}_options", None)
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain values only: what goes into config.json."""
        fields = {field.name: _plain(getattr(self, field.name)) for field in dataclasses.fields(self)}
        return {key: value for key, value in fields.items() if value not in (None, [], "", {})}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Recipe:
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = set(fields) - known
        if unknown:
            raise RecipeError(f"a recipe has no field {sorted(unknown)[0]!r}: {nearest(sorted(unknown)[0], known)}")
        values = dict(fields)
        for role in ("linear", "head", "embedding", "conv"):
            if values.get(role) is not None:
                values[role] = as_format(values[role])
        values["skip"] = tuple(values.get("skip", ()))
        values["alternatives"] = tuple(as_format(f) for f in values.get("alternatives", ()))
        values["overrides"] = tuple((p, as_format(f) if f else None) for p, f in values.get("overrides", ()))
        values["notes"] = tuple((p, note) for p, note in values.get("notes", ()))
        for kind, default, table in (("rounder", "rtn", ROUNDER_OPTIONS), ("scaler", "", SCALER_OPTIONS)):
            key = f"{kind}_options"
            values[key] = options_from(kind, values.get(kind, default), values.get(key) or {}, table)
        return cls(**values)


def _plain(value: Any) -> Any:
    if isinstance(value, Format):
        return value.name
    if isinstance(value, Options):
        return value.to_dict()
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value


# What the families call the projection of attention values, where it is a weight of its own, and the weights in which it
# is fused with those of queries or keys.
VALUES = (
    r"(^|\.)(v_proj|v_lin|value_proj|to_v|wv)$|[aA]ttention(\.self|\.attention)?\.(value|v)$|(attn|crossattention)\.v$"
)
FUSED_VALUES = (
    r"(^|\.)(query_key_value|qkv_proj|qkv|[wW]qkv|W_pack|c_attn|att_proj|to_qkv|kv_proj|kv_b_proj|key_value|to_kv)$"
)
# The weights to which the old systems' mixtures give more bits.
_HURT = r"(v_proj|down_proj)$"
# Patterns that recipes bring along by themselves.
OVERRIDES_OF_RECIPES = (VALUES, _HURT)
# What recipes themselves say of paths is about their own choice, not about one that an override makes.
NOTES_OF_RECIPES = (FUSED_VALUES,)
_FUSED_NOTE = (
    "values share this weight with queries or keys, so they have its format and not the 6 bit that int4 gives them"
)

# The 4-bit default is measured, not assumed: benchmarks/results/default_format.md has the table. The value projections
# are a fortieth of the weights and carry a quarter of the damage: at 6 bit they save more than any use of as many bits.
_INT4 = Recipe(
    as_format("int4_g64"),
    head=as_format("int5_g32"),
    embedding=as_format("int5_g32"),
    overrides=((VALUES, as_format("int6_g64")),),
    notes=((FUSED_VALUES, _FUSED_NOTE),),
    name="int4",
)
RECIPES: dict[str, Recipe] = {"int4": _INT4, "sym_int4": _INT4}


def recipe_named(name: str | Format | Recipe) -> Recipe:
    """The recipe that a name stands for: a recipe, an old system's mixture, or a format for every linear and the head."""
    if isinstance(name, Recipe):
        return name
    if isinstance(name, Format):
        return Recipe(name, head=name, name=_name_of(name))
    if not isinstance(name, str) or not name.strip():
        raise FormatError(f"{name!r} names no format: give a name as text, such as 'int4', 'int3_g32' or 'nf4'")
    key = name.strip().lower()
    if key in RECIPES:
        return RECIPES[key]
    if key in MIXED:
        first, second = (as_format(f) for f in MIXED[key])
        return Recipe(first, head=first, alternatives=(second,), name=key)
    if key in MIXTURES:
        most, head, hurt = (as_format(f) for f in MIXTURES[key])
        return Recipe(most, head=head, overrides=((_HURT, hurt),), name=key)
    if key in IQ_TYPES:
        return _stand_in(key)
    if key in CASTS:
        raise FormatError(f"{name} packs nothing, it is a plain type: ask for dtype {CASTS[key]} instead of a format")
    format = as_format(key)
    return Recipe(format, head=format, name=key if key in ALIASES else _name_of(format))


def _name_of(format: Format) -> str:
    """The name of a format for every weight, apart from that of a recipe which is called like it."""
    return f"{format.name}_g{format.group_size}" if format.name in RECIPES else format.name


def _stand_in(name: str) -> Recipe:
    """What is made of a model where an iq type is asked for, and a warning that says so."""
    most, head, values = (as_format(f) for f in IQ_STAND_IN)
    warnings.warn(
        f"{name} needs grids that lowbit does not have: {most} stands in for it, {most.bits_per_weight:.2f} bits a weight "
        f"instead of {IQ_TYPES[name]:.2f}",
        stacklevel=3,
    )
    return Recipe(most, head=head, overrides=((VALUES, values),))
