"""The options of the algorithms, as frozen values that a recipe carries and a saved folder keeps.

    ROUNDER_OPTIONS    how codes and scales are chosen      {name: its options}
    SCALER_OPTIONS     how inputs are scaled beforehand     {name: its options}

Command line flags (`--algorithm-option damping=0.05`) and the saved form are both read off the fields, so that an
option is said once: here, with its default and its limits. `algorithms.ROUNDERS` and `algorithms.SCALERS` say what
runs under each name. Nothing here imports torch: a recipe is read without it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from lowbit.errors import RecipeError, nearest

ORDERS = ("group", "activation", "none")
# Windows of calibration text, and tokens of each.
SAMPLES = 128
LENGTH = 512
DUOS = ("on", "off", "both")
_TRUTHS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


@dataclass(frozen=True)
class Options:
    """What the options of all algorithms can do.

    `data`: whether calibration tokens are "needed", "used" where they are given, or "none" of the algorithm's business.
    """

    data: ClassVar[str] = "none"

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def defaults_text(self) -> str:
        """Every field as it is typed."""
        return " ".join(f"{name}={value}" for name, value in self.to_dict().items()) or "none"


@dataclass(frozen=True)
class PlainOptions(Options):
    """An algorithm that has nothing to choose."""


@dataclass(frozen=True)
class RtnOptions(Options):
    """`importance`: where calibration tokens are given, the search of scales weighs each input by its mean square."""

    data: ClassVar[str] = "used"
    importance: bool = True


@dataclass(frozen=True)
class GptqOptions(Options):
    """`damping` is the share of the mean diagonal added to the Hessian; it rises by itself until there is a Cholesky factor.

    `order`: in which order columns are rounded: "group" (by activation inside groups and groups by their largest, nothing
    is reordered in what is saved), "activation" (act-order, which needs `static_groups`), "none".
    `static_groups`: all scales are fixed before the first column is rounded.
    `true_sequential`: linears see the rounded output of those before them in their block.
    `correction`: GPTAQ's alpha: how much of the difference to the inputs in full precision is made good; 0 is off. A
    quarter takes the divergence of the reference model at 4 bits from 0.124 to 0.072 (docs/notes/calibration.md).
    `least_share`: below this share of all tokens a weight (an expert, mostly) is rounded to nearest instead.
    """

    data: ClassVar[str] = "needed"
    damping: float = 0.01
    order: str = "group"
    static_groups: bool = False
    true_sequential: bool = True
    correction: float = 0.25
    least_share: float = 0.005
    block_columns: int = 128

    def __post_init__(self) -> None:
        if self.order not in ORDERS:
            raise RecipeError(f"gptq has no order {self.order!r}: {nearest(self.order, ORDERS)}")
        if self.order == "activation" and not self.static_groups:
            raise RecipeError(
                "order='activation' mixes the columns of all groups, so that every call would have to gather its inputs: "
                "set static_groups=True with it, or leave order='group', which is as good and needs neither"
            )
        limits = {"damping": (1e-6, 1.0), "correction": (0.0, 1.0), "least_share": (0.0, 1.0)}
        for name, (low, high) in limits.items():
            if not low <= getattr(self, name) <= high:
                raise RecipeError(f"gptq takes a {name} from {low:g} to {high:g}, and was given {getattr(self, name)}")
        if self.block_columns < 1:
            raise RecipeError(f"gptq rounds at least one column at a time, not block_columns={self.block_columns}")


@dataclass(frozen=True)
class HqqOptions(Options):
    """The power of the objective, how fast beta rises from where, and for how many turns: the defaults of the project hqq.

    `reach` is the share of a scale below which it may not fall: 1 lets it only grow, 0 lets it give up large weights. KL of
    the reference model at int4_asym_g64 (4 windows of each text): 0.349 with 1, 0.357 with 0.95. Fine zero points
    (int4_fine) take the power and the turns alone: their steps have closed forms.
    """

    power: float = 0.7
    beta: float = 10.0
    growth: float = 1.01
    iterations: int = 20
    reach: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.power <= 1:
            raise RecipeError(f"hqq: a power of {self.power}; it is above 0 and at most 1")
        if not 0 <= self.reach <= 1:
            raise RecipeError(f"hqq: a reach of {self.reach}; it is a share of the scale, from 0 to 1")
        if self.beta <= 0 or self.growth < 1 or self.iterations < 0:
            raise RecipeError("hqq: beta is above 0, its growth at least 1, and there is no negative number of turns")


@dataclass(frozen=True)
class AutoRoundOptions(Options):
    """How long and how fast a block is tuned; a recipe of `AUTOROUND_RECIPES` is such a value.

    `rate` is the first step of the votes and `range_rate` that of the ranges; 0 leaves them to the number of iterations.
    `outliers`: the share of the largest errors that is left out of the loss at 2 and 3 bits.
    `enable_quanted_input`: a block is tuned on what the rounded blocks before it give.
    `samples`: windows of calibration text, where nobody says how many.
    """

    data: ClassVar[str] = "needed"
    iterations: int = 200
    batch_rows: int = 8
    rate: float = 0.0
    range_rate: float = 0.0
    outliers: float = 0.001
    enable_quanted_input: bool = True
    samples: int = SAMPLES
    seed: int = 42

    def __post_init__(self) -> None:
        if self.iterations < 1 or self.batch_rows < 1 or self.samples < 1:
            raise RecipeError("autoround: at least one iteration over at least one row of one sample")
        if not 0 <= self.outliers < 1:
            raise RecipeError(f"autoround: a share of outliers of {self.outliers}; it is at least 0 and below 1")
        if self.rate < 0 or self.range_rate < 0:
            raise RecipeError("autoround: rates are positive, or 0 for those that fit the number of iterations")


# The recipes of the project auto-round, by its names; `--algorithm-option recipe=best` names one too.
AutoRoundRecipe = Literal["light", "default", "best"]
AUTOROUND_RECIPES: dict[AutoRoundRecipe, AutoRoundOptions] = {
    "light": AutoRoundOptions(iterations=50, rate=5e-3),
    "default": AutoRoundOptions(),
    "best": AutoRoundOptions(iterations=1000, samples=512),
}


@dataclass(frozen=True)
class AwqOptions(Options):
    """`steps`: how many ratios are tried from 0 up to 1. `duo`: whether the room that the weights leave counts too:
    "on", "off", or "both" ways are tried. `scale` and `clip`: whether inputs are scaled, and whether the largest weights of
    each group may be clipped.
    `tokens`: over how many tokens a loss is taken, of those that calibration gives.
    """

    data: ClassVar[str] = "needed"
    steps: int = 20
    duo: str = "both"
    scale: bool = True
    clip: bool = True
    tokens: int = 4096

    def __post_init__(self) -> None:
        if self.duo not in DUOS:
            raise RecipeError(f"awq has no duo {self.duo!r}: {nearest(self.duo, DUOS)}")
        if not (self.scale or self.clip):
            raise RecipeError("awq with neither scale nor clip does nothing: leave the scaler out")
        _at_least_one("awq", self, "steps", "tokens")


@dataclass(frozen=True)
class SmoothQuantOptions(Options):
    """`alpha`: how much of the spread of activations moves into the weights, 0 to 1. `search`: instead of one alpha for
    all, each group of linears takes the best of `steps` + 1 alphas from `lowest` to `highest`. `tokens`: as for awq.
    """

    data: ClassVar[str] = "needed"
    alpha: float = 0.5
    search: bool = True
    lowest: float = 0.0
    highest: float = 1.0
    steps: int = 10
    tokens: int = 4096

    def __post_init__(self) -> None:
        for name in ("alpha", "lowest", "highest"):
            if not 0 <= getattr(self, name) <= 1:
                raise RecipeError(f"the {name} of smoothquant is from 0 to 1, and was given as {getattr(self, name):g}")
        if self.lowest > self.highest:
            raise RecipeError(f"smoothquant searches from {self.lowest:g} up, so highest cannot be {self.highest:g}")
        _at_least_one("smoothquant", self, "steps", "tokens")


@dataclass(frozen=True)
class TeqOptions(Options):
    """`steps` of Adam with a `rate` that falls to nothing, on one call each; of `checks` looks at the loss over `tokens`
    tokens, spread over the steps, the best is kept.
    """

    data: ClassVar[str] = "needed"
    steps: int = 200
    rate: float = 0.01
    checks: int = 8
    tokens: int = 16384
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.rate > 0:
            raise RecipeError(f"teq trains with a rate above 0, and was given {self.rate:g}")
        _at_least_one("teq", self, "steps", "checks", "tokens")


def _at_least_one(name: str, options: Options, *fields: str) -> None:
    for field in fields:
        if getattr(options, field) < 1:
            raise RecipeError(f"{name} needs {field} of at least 1, and was given {getattr(options, field)}")


# One row for each algorithm.
ROUNDER_OPTIONS: dict[str, type[Options]] = {
    "rtn": RtnOptions,
    "plain_rtn": PlainOptions,
    "clip_rtn": PlainOptions,
    "hqq": HqqOptions,
    "gptq": GptqOptions,
    "autoround": AutoRoundOptions,
}
SCALER_OPTIONS: dict[str, type[Options]] = {
    "awq": AwqOptions,
    "smoothquant": SmoothQuantOptions,
    "teq": TeqOptions,
}
# Options that have a name together: `recipe` in the place of a field stands for all of them, and fields beside it win.
RECIPE = "recipe"
OPTION_RECIPES: dict[str, Mapping[str, Options]] = {"autoround": dict(AUTOROUND_RECIPES.items())}


_FLAGS = {"rounder": "algorithm", "scaler": "scaler"}


def options_for(kind: str, name: str, given: Options | None, table: dict[str, type[Options]]) -> Options | None:
    """The options of the algorithm `name` of a table, checked to be its own; None for no algorithm."""
    if not name and given is None:
        return None
    if name not in table:
        known = nearest(name, table) if table else "there is none yet"
        for other, names in (("rounder", ROUNDER_OPTIONS), ("scaler", SCALER_OPTIONS)):
            if name in names:
                known = f"it is a {other} (on the command line --{_FLAGS[other]} {name})"
        raise RecipeError(f"no {kind} is called {name!r}: {known}")
    if given is None:
        return table[name]()
    if type(given) is not table[name]:
        raise RecipeError(f"the {kind} {name} takes {table[name].__name__}, and was given {type(given).__name__}")
    return given


def options_from(kind: str, name: str, fields: dict[str, Any], table: dict[str, type[Options]]) -> Options | None:
    """The options of an algorithm from plain values, as a saved recipe holds them."""
    if not name:
        return None
    options_for(kind, name, None, table)
    found = table[name]
    types = {field.name: type(field.default) for field in dataclasses.fields(found)}
    recipes = OPTION_RECIPES.get(name, {})
    values: dict[str, Any] = {}
    if recipes and RECIPE in fields:
        if fields[RECIPE] not in recipes:
            raise RecipeError(f"{name} has no recipe {fields[RECIPE]!r}: it has {', '.join(recipes)}")
        values = recipes[fields[RECIPE]].to_dict()
    for key, value in fields.items():
        if recipes and key == RECIPE:
            continue
        if key not in types:
            known = nearest(key, types) if types else "it has none"
            raise RecipeError(f"the {kind} {name} has no option {key!r}: {known}")
        whole = types[key] is float and type(value) is int
        values[key] = float(value) if whole else value
        if type(values[key]) is not types[key]:
            raise RecipeError(f"the option {key} of {name} is a {types[key].__name__}, not {value!r}")
    return found(**values)


def _read_value(kind: Any, text: str) -> Any:
    return _TRUTHS[text.lower()] if kind is bool else kind(text)


def parse_options(kind: str, name: str, texts: Iterable[str], table: dict[str, type[Options]]) -> Options | None:
    """The options of an algorithm from `field=value`, as they are typed."""
    found = options_for(kind, name, None, table)
    types = {field.name: type(field.default) for field in dataclasses.fields(found)} if found else {}
    fields: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise RecipeError(f"{text!r} is not an option: write NAME=VALUE, for example damping=0.05")
        try:
            fields[key] = _read_value(types.get(key, str), value)
        except (KeyError, ValueError):
            raise RecipeError(f"the option {key} of {name} is a {types[key].__name__}, not {value!r}") from None
    if fields and found is None:
        raise RecipeError(f"the option {next(iter(fields))} belongs to a {kind}, and none is named")
    return options_from(kind, name, fields, table)
