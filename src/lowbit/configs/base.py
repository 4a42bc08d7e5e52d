"""Neural Compressor's configurations: what a script asks for in that system's words, and what it means here.

    RtnConfig(bits=4)                  rounder rtn
    GPTQConfig(tokenizer=tokenizer)    rounder gptq
    AwqConfig(), TeqConfig()           scaler awq, scaler teq, rounder rtn
    AutoRoundConfig(iters=200)         rounder autoround

Names, order and defaults of the parameters are that system's. Each class turns into a `Recipe` (`to_recipe`) and into the
text that it is calibrated on (`calibration`); `from_pretrained(quantization_config=...)` does the rest. Every field is
checked when the configuration is made, by the formats and options that it becomes. What can change nothing any more is
taken, and one warning of one line names it.

Three things are meant otherwise than the letter says. desc_act=False still rounds columns by activation, inside their
groups, which costs nothing where the model runs; a scale of no named type is fp16 on every device; and the default data
set, which only the hub has, is lowbit's own default text.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import warnings
from abc import ABCMeta, abstractmethod
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

from lowbit.contents import read_json
from lowbit.errors import CheckpointError, RecipeError, nearest
from lowbit.formats import PER_CHANNEL, Format, as_format
from lowbit.options import Options
from lowbit.recipe import Recipe

CONFIG_FILE = "quantize_config.json"
# The default of every `dataset`: 10000 texts of the Pile, on the hub.
PILE = "NeelNanda/pile-10k"
LEAST_BITS, MOST_BITS = 2, 8
# What the families call the head. It stays dense because the recipe leaves it so, under whatever name.
_HEADS = ("lm_head", "transformer.output_layer", "embed_out")
_SCALES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_COMPUTES = ("fp32", "bf16", "fp16", "int8")
_LONG_NAMES = {long: short for short, long in _SCALES.items()}

ONE_BLOCK = "one block is in memory at a time in any case"
BATCHES = "the size of a batch changes no result"
IDLE = {"use_layer_wise": ONE_BLOCK, "model_path": "the model is the one that is loaded"}
DISCOVERED = {"absorb_layer_dict": "what can absorb a scale is found by running each block"}


class QuantizationMethod(StrEnum):
    """The values of `quant_method`."""

    RTN = "rtn"
    GPTQ = "gptq"
    AWQ = "awq"
    TEQ = "teq"
    AUTOROUND = "autoround"


@dataclass(frozen=True)
class CalibrationText:
    """What a configuration wants to be calibrated on, as `calibration.calibration_from` takes it: a source of any kind, the
    tokenizer that cuts it (None: the model's own), how many windows, and how many tokens each."""

    source: Any
    tokenizer: Any
    samples: int
    length: int


class _Lenient(ABCMeta):
    """Classes whose calls swallow keywords that they do not know, with a warning: scripts of that system pass such."""

    def __call__(cls, *values: Any, **named: Any) -> Any:
        named = cls.in_its_words(named)
        known = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
        config = super().__call__(*values, **{name: value for name, value in named.items() if name in known})
        reasons = {name: nearest(name, known) for name in named if name not in known} | config.idle()
        if reasons:
            said = "; ".join(f"{name} ({reason})" for name, reason in reasons.items())
            warnings.warn(f"{cls.__name__}: what changes nothing here is ignored: {said}", stacklevel=2)
        return config

    def in_its_words(cls, named: dict[str, Any]) -> dict[str, Any]:
        """Keywords as a class has them, where others say the same by another name: a class may have a method of its own."""
        return named


@dataclass
class WeightOnlyConfig(metaclass=_Lenient):
    """What the five configurations share."""

    model_path: str = field(default="", kw_only=True)
    modules_to_not_convert: list[str] = field(default_factory=lambda: list(_HEADS), kw_only=True)
    device: str = field(default="auto", kw_only=True)

    quant_method: ClassVar[QuantizationMethod]
    # Fields that nothing depends on, and why.
    without_effect: ClassVar[dict[str, str]] = IDLE

    def __post_init__(self) -> None:
        own = vars(self)
        own["bits"] = 4 if own["bits"] is None else own["bits"]
        own["weight_dtype"] = own["weight_dtype"] or f"int{own['bits']}"
        if own["quant_lm_head"]:
            self.modules_to_not_convert = [name for name in self.modules_to_not_convert if name not in _HEADS]
        self.to_recipe()

    @abstractmethod
    def to_recipe(self) -> Recipe:
        """The recipe that this configuration means; raises a RecipeError where it contradicts itself."""

    def calibration(self) -> CalibrationText | None:
        """The text to calibrate on, or None for a configuration that looks at none."""
        own = vars(self)
        if not self.to_recipe().asks_for_data:
            return None
        return CalibrationText(own["dataset"], own["tokenizer"], own["n_samples"], own["seq_len"])

    @property
    def compute(self) -> str:
        """What products are computed in, in lowbit's words."""
        return _short_name(vars(self)["compute_dtype"]) or "auto"

    @property
    def scheme(self) -> str:
        return "sym" if getattr(self, "sym") else "asym"  # noqa: B009

    def idle(self) -> dict[str, str]:
        """Fields that ask for something which changes nothing, and why."""
        defaults = {f.name: _default(f) for f in dataclasses.fields(self)}
        return {name: why for name, why in self.without_effect.items() if vars(self)[name] != defaults[name]}

    def update(self, **values: Any) -> dict[str, Any]:
        """Set the fields that there are; returns the rest."""
        known = {f.name for f in dataclasses.fields(self)}
        for name in known & values.keys():
            setattr(self, name, values[name])
        if "bits" in values and "weight_dtype" not in values:
            vars(self)["weight_dtype"] = None
        self.__post_init__()
        return {name: value for name, value in values.items() if name not in known}

    def to_dict(self) -> dict[str, Any]:
        """Plain values. A tokenizer, and texts or tokens given as such, are not among them."""
        fields = {f.name: copy.copy(vars(self)[f.name]) for f in dataclasses.fields(self)}
        for name in ("compute_dtype", "scale_dtype"):
            fields[name] = _short_name(fields[name])
        if "tokenizer" in fields:
            fields["tokenizer"] = None
            fields["dataset"] = str(fields["dataset"]) if isinstance(fields["dataset"], str | Path) else None
        return {"quant_method": self.quant_method.value, **fields, "scheme": self.scheme}

    def to_diff_dict(self) -> dict[str, Any]:
        """The values that are not the defaults."""
        usual = type(self)().to_dict()
        return {name: value for name, value in self.to_dict().items() if value != usual[name]}

    def to_json_string(self, use_diff: bool = True) -> str:
        return json.dumps(self.to_diff_dict() if use_diff else self.to_dict(), indent=2, sort_keys=True) + "\n"

    def to_json_file(self, json_file_path: str | Path, use_diff: bool = True) -> None:
        Path(json_file_path).write_text(self.to_json_string(use_diff), encoding="utf-8")

    def save_pretrained(self, save_directory: str | Path, **_: Any) -> None:
        """Write `quantize_config.json` into a folder."""
        folder = Path(save_directory)
        if folder.is_file():
            raise CheckpointError(f"{folder} is a file: name a folder to save the configuration in")
        folder.mkdir(parents=True, exist_ok=True)
        self.to_json_file(folder / CONFIG_FILE, use_diff=False)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **others: Any) -> Any:
        """A configuration from its values; those that are worked out are left out, other keywords win."""
        known = {f.name for f in dataclasses.fields(cls)}
        config = cls(**{name: value for name, value in config_dict.items() if name in known})
        unused = config.update(**others)
        return (config, unused) if return_unused_kwargs else config

    @classmethod
    def from_json_file(cls, json_file: str | Path) -> Self:
        config: Self = cls.from_dict(read_json(Path(json_file)))
        return config

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | Path, **options: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The values that a folder's `quantize_config.json` holds, and the keywords that are not for this."""
        name = options.pop("_configuration_file", CONFIG_FILE)
        return read_json(Path(pretrained_model_name_or_path) / name), options


class Said(Protocol):
    """The fields that decide about a format."""

    modules_to_not_convert: list[str]

    @property
    def bits(self) -> int: ...
    @property
    def group_size(self) -> int: ...
    @property
    def compute_dtype(self) -> Any: ...
    @property
    def scale_dtype(self) -> Any: ...
    @property
    def weight_dtype(self) -> Any: ...
    @property
    def sym(self) -> bool: ...
    @property
    def quant_lm_head(self) -> bool: ...


def build_recipe(config: Said, rounder: str, options: Options | None = None) -> Recipe:
    format = _format(config)
    skip = tuple(name for name in config.modules_to_not_convert if name not in _HEADS)
    name = f"{type(config).__name__} {format}"
    head = format if config.quant_lm_head else None
    return Recipe(format, head=head, rounder=rounder, rounder_options=options, skip=skip, name=name)


def _format(config: Said) -> Format:
    who, bits, group = type(config).__name__, config.bits, config.group_size
    if type(bits) is not int or not LEAST_BITS <= bits <= MOST_BITS:
        raise RecipeError(f"{who} takes {LEAST_BITS} to {MOST_BITS} bits, and was given {bits!r}")
    if type(group) is not int or group == 0 or group < PER_CHANNEL:
        raise RecipeError(f"{who} takes a group_size from 1 up, or -1 for whole rows, and was given {group!r}")
    format = as_format(config.weight_dtype or f"int{bits}")
    if format.bits != bits:
        raise RecipeError(
            f"{who}: bits={bits} and weight_dtype={config.weight_dtype!r} contradict each other: leave one of them out"
        )
    scale, compute = _short_name(config.scale_dtype), _short_name(config.compute_dtype)
    if scale is not None and scale not in _SCALES:
        raise RecipeError(f"{who} has no scale_dtype {scale!r}: {nearest(scale, _SCALES)}")
    if compute is not None and compute not in _COMPUTES:
        raise RecipeError(f"{who} has no compute_dtype {compute!r}: {nearest(compute, _COMPUTES)}")
    symmetric = {} if config.sym else {"symmetric": False}
    return format.replace(group_size=group, scale_dtype=_SCALES[scale or "fp16"], **symmetric)


def _short_name(dtype: Any) -> str | None:
    """A type as these configurations name it, from its name or torch's type."""
    name = None if dtype is None else str(dtype).removeprefix("torch.")
    return name if name is None else _LONG_NAMES.get(name, name)


def check_counts(config: WeightOnlyConfig, *names: str) -> None:
    for name in names:
        value = vars(config)[name]
        if type(value) is not int or value < 1:
            raise RecipeError(f"{type(config).__name__} takes {name} from 1 up, and was given {value!r}")


def _default(of: dataclasses.Field[Any]) -> Any:
    return of.default if of.default_factory is dataclasses.MISSING else of.default_factory()
