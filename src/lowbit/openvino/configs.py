"""What the configurations of optimum-intel ask for, in their words, and what is done about it.

    OVWeightQuantizationConfig(bits=4)                        codes as the weights are read, one layer at a time
    OVWeightQuantizationConfig(bits=4, ratio=0.8)             the graph in 16 or 32 bits first, then `compress_weights`
    OVWeightQuantizationConfig(bits=4, dataset="auto", gptq=True)      the same, with what the model is given
    OVWeightQuantizationConfig(bits=4, quant_method="awq", dataset=texts)  the torch model by AWQ, then written (scaled.py)
    ... with ratio=0.8, or another wish about which weights    the graph, AWQ in it too (scaling.py)

Names, order and defaults of the fields are that package's; each class is also taken as a dict of its fields. Beside them stand
lowbit's own configurations (RtnConfig, GPTQConfig, AwqConfig, TeqConfig, AutoRoundConfig), and GPTQConfig of transformers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from lowbit.configs.base import WeightOnlyConfig
from lowbit.configs.classes import GPTQConfig, config_from
from lowbit.errors import RecipeError, nearest
from lowbit.formats import PER_CHANNEL, Format, format_from_name
from lowbit.openvino.modes import AdvancedCompressionParameters, GroupSizeFallbackMode, IgnoredScope, as_member
from lowbit.openvino.scaled import scaled
from lowbit.recipe import Recipe

EIGHT = format_from_name("int8_asym_channel")
# What optimum-intel takes for four bits where nothing else is said.
DEFAULT_GROUP = 128
# dtype: the mode of compress_weights, and the format without one.
_MODES = {
    "int8": ("int8_asym", "int8_sym"), "int4": ("int4_asym", "int4_sym"), "nf4": ("nf4", "nf4"), "mxfp4": ("mxfp4", "mxfp4"),
    "cb4": ("cb4", "cb4"),
}  # fmt: skip
_FORMATS = {
    "int4_asym": "int4_asym", "int4_sym": "int4", "nf4": "nf4", "int8_asym": EIGHT.name, "int8_sym": "int8_channel",
    "mxfp4": "mxfp4",
}  # fmt: skip
# The fields that a recipe takes; with any other the graph is compressed as a whole.
_AS_READ = {"bits", "sym", "group_size", "tokenizer", "ratio", "num_samples", "dtype", "dq_group_size"}
# Modes that the core does not round to: the graph is compressed as a whole.
_OF_GRAPHS = ("mxfp4", "cb4")
_BITS = (4, 8)
_WITHOUT = {
    "statistics_path": "statistics are taken anew from the dataset: leave it out",
    "processor": "what is calibrated on is text: give tokenizer= instead",
}


class OVQuantizationMethod(StrEnum):
    """The values of `quant_method`."""

    DEFAULT = "default"
    AWQ = "awq"
    HYBRID = "hybrid"


@dataclass
class OVWeightQuantizationConfig:
    """Weights in 4 or 8 bits."""

    bits: int = 8
    sym: bool = False
    group_size: int | None = None
    tokenizer: Any = None
    dataset: Any = None
    ratio: float = 1.0
    all_layers: bool | None = None
    sensitivity_metric: str | None = None
    ignored_scope: Any = None
    num_samples: int | None = None
    quant_method: str = OVQuantizationMethod.DEFAULT
    scale_estimation: bool | None = None
    dtype: str | None = None
    gptq: bool | None = None
    processor: Any = None
    lora_correction: bool | None = None
    backup_precision: str | None = None
    statistics_path: str | None = None
    group_size_fallback: str | None = None
    dq_group_size: int | None = None

    def __post_init__(self) -> None:
        if self.bits not in _BITS:
            raise RecipeError(
                f"bits={self.bits!r}: OpenVINO's weights have 4 or 8; other widths are compress_weights' modes"
            )
        method = str(getattr(self.quant_method, "value", self.quant_method))
        if method not in list(OVQuantizationMethod):
            raise RecipeError(f"quant_method={method!r} is none: {nearest(method, list(OVQuantizationMethod))}")
        self.quant_method = OVQuantizationMethod(method)
        if self.dtype is not None and self.dtype not in _MODES:
            raise RecipeError(f"dtype={self.dtype!r} is no type of weights: {nearest(self.dtype, _MODES)}")
        if not 0 <= self.ratio <= 1:
            raise RecipeError(f"ratio={self.ratio!r} is no share of the weights, from 0 to 1")
        if self.group_size is not None and self.group_size < 1 and self.group_size != PER_CHANNEL:
            raise RecipeError(f"group_size={self.group_size!r}: a group has 1 weight or more, or the whole row (-1)")
        if self.group_size_fallback is not None:
            as_member(GroupSizeFallbackMode, self.group_size_fallback)
        for name, instead in _WITHOUT.items():
            if getattr(self, name) is not None:
                raise RecipeError(f"{name}: {instead}")

    @property
    def mode(self) -> str:
        """The mode of `compress_weights`."""
        return _MODES[self.dtype or f"int{self.bits}"][self.sym]

    @property
    def _format(self) -> Format:
        """The format of the products."""
        if self.mode == "cb4":
            raise RecipeError("dtype='cb4' is a table that graphs alone have: take dtype='nf4' with quant_method='awq'")
        format = format_from_name(_FORMATS[self.mode])
        grouped = format.bits < max(_BITS) and self.mode != "mxfp4"
        return format.with_group(self.group_size or DEFAULT_GROUP) if grouped else format

    @property
    def recipe(self) -> Recipe | None:
        """What is done to the weights as they are read, with the `ratio`; None where the whole graph, or what it is given, has a
        say."""
        said = {field.name for field in dataclasses.fields(self) if getattr(self, field.name) != field.default}
        if said - _AS_READ or self.mode in _OF_GRAPHS:
            return None
        format = self._format
        backup = format if format.bits == max(_BITS) else EIGHT
        return Recipe(format, head=backup, embedding=backup, name=self.mode)

    @property
    def of_torch(self) -> WeightOnlyConfig | None:
        """The configuration by which the torch model is quantised: AWQ judges a scale there by what a whole block makes of it. None
        where something is asked for that graphs alone have, which AWQ scales too."""
        of_graphs = self.ratio != 1 or self.ignored_scope or self.sensitivity_metric or self.group_size_fallback
        if self.quant_method != OVQuantizationMethod.AWQ or (of_graphs and self._format.bits < max(_BITS)):
            return None
        return scaled(self, self._format, EIGHT)

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of `compress_weights` but for its dataset."""
        if self.quant_method == OVQuantizationMethod.HYBRID:
            raise RecipeError(
                "quant_method='hybrid' rounds activations of diffusion models, which lowbit leaves in 16 bits"
            )
        scope = IgnoredScope(**self.ignored_scope) if isinstance(self.ignored_scope, Mapping) else self.ignored_scope
        asked = {
            "mode": self.mode,
            "ratio": None if self.mode.startswith("int8") else self.ratio,
            "group_size": self.group_size,
            "ignored_scope": scope,
            "all_layers": self.all_layers,
            "sensitivity_metric": self.sensitivity_metric,
            "scale_estimation": self.scale_estimation,
            "gptq": self.gptq,
            "awq": self.quant_method == OVQuantizationMethod.AWQ or None,
            "lora_correction": self.lora_correction,
            "backup_mode": self.backup_precision,
            "subset_size": self.num_samples,
            "advanced_parameters": None
            if self.group_size_fallback is None
            else _falling_back(self.group_size_fallback),
        }
        return {name: value for name, value in asked.items() if value is not None}

    def to_dict(self) -> dict[str, Any]:
        """Plain values: without the tokenizer, the processor and texts given as such."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        for name in ("tokenizer", "processor"):
            fields[name] = fields[name] if isinstance(fields[name], str) else None
        return fields | {"quant_method": str(self.quant_method)}


def _falling_back(mode: str) -> AdvancedCompressionParameters:
    return AdvancedCompressionParameters(group_size_fallback_mode=as_member(GroupSizeFallbackMode, mode))


@dataclass
class OVConfig:
    """What optimum-intel keeps beside a model: here the holder of its quantisation."""

    input_info: list[Any] | None = None
    save_onnx_model: bool | None = None
    quantization_config: Any = None
    dtype: str | None = None

    def __post_init__(self) -> None:
        if self.quantization_config is not None:
            self.quantization_config = read_config(self.quantization_config)


Quantization = OVWeightQuantizationConfig | WeightOnlyConfig


def read_config(given: Any) -> Quantization:
    """A configuration of any of the kinds, or a dict of its fields."""
    if isinstance(given, OVConfig):
        given = given.quantization_config
    if isinstance(given, Quantization):
        return given
    fields = dict(given) if isinstance(given, Mapping) else _fields_of(given)
    known = {field.name for field in dataclasses.fields(OVWeightQuantizationConfig)}
    if fields.keys() <= known:
        return OVWeightQuantizationConfig(**fields)
    method = getattr(fields.get("quant_method"), "value", fields.get("quant_method"))
    if method == "gptq" and not isinstance(given, Mapping):
        return _from_transformers(fields)
    if method == "bitsandbytes":
        raise RecipeError(
            f"BitsAndBytesConfig is for torch models on a GPU: give load_in_{_bits_of(fields)}bit=True instead"
        )
    found = config_from({**fields, "quant_method": method}) if method is not None else None
    if found is not None:
        return found
    odd = sorted(fields.keys() - known)[0]
    raise RecipeError(
        f"quantization_config has a field {odd!r}, which no configuration here knows: {nearest(odd, known)}"
    )


def _bits_of(fields: Mapping[str, Any]) -> int:
    return 4 if fields.get("load_in_4bit") or fields.get("_load_in_4bit") else 8


def _fields_of(given: Any) -> dict[str, Any]:
    if not hasattr(given, "to_dict"):
        raise RecipeError(
            f"quantization_config is a configuration or a dict of its fields, not a {type(given).__name__}: use "
            "OVWeightQuantizationConfig, or lowbit's RtnConfig, GPTQConfig, AwqConfig, TeqConfig, AutoRoundConfig"
        )
    return dict(given.to_dict())


def _from_transformers(fields: Mapping[str, Any]) -> GPTQConfig:
    """transformers' GPTQConfig; its names of data sets lie on the hub, in whose place is lowbit's default text."""
    data = fields.get("dataset")
    named: dict[str, Any] = {"dataset": data} if isinstance(data, list) else {}
    taken = ("bits", "tokenizer", "group_size", "sym", "damp_percent", "desc_act", "true_sequential")
    return GPTQConfig(**{name: fields[name] for name in taken if fields.get(name) is not None}, **named)
