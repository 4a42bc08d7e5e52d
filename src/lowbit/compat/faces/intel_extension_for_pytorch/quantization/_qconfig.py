"""Configurations: torch's `QConfigMapping`, filled as that library fills it. What each means here:

get_weight_only_quant_qconfig_mapping    a number format for weights, and what products are computed in (`lowp_mode`)
get_smooth_quant_qconfig_mapping         w8a8 with fixed ranges and smoothing (`alpha`)
default_static_qconfig_mapping           w8a8 with fixed ranges from torch's observer
default_dynamic_qconfig_mapping          w8a8, each row of activations with a scale of its own
"""

from __future__ import annotations

from collections import namedtuple
from enum import IntEnum
from typing import Any

import torch
from torch.ao.quantization import (
    HistogramObserver,
    MinMaxObserver,
    PerChannelMinMaxObserver,
    PlaceholderObserver,
    QConfig,
    QConfigMapping,
)

from lowbit.compat.ignored import say_ignored, say_once
from lowbit.compat.missing import refuse_unknown
from lowbit.compat.names import IGNORED, WORKS, Name
from lowbit.errors import RecipeError, nearest
from lowbit.formats import Format, as_format


class StageError(RecipeError, AssertionError):
    """A configuration that contradicts itself, or of another stage. That library asserted here, and scripts catch it so."""


class WoqWeightDtype(IntEnum):
    INT8 = 1
    INT4 = 2
    NF4 = 3
    FP8 = 4


class WoqLowpMode(IntEnum):
    NONE = 0
    FP16 = 1
    BF16 = 2
    INT8 = 3


class WoqActQuantMode(IntEnum):
    NONE = -1
    PER_TENSOR = 0
    PER_IC_BLOCK = 1
    PER_BATCH = 2
    PER_BATCH_IC_BLOCK = 3
    PER_TENSOR_SYM = 4
    PER_IC_BLOCK_SYM = 5
    PER_BATCH_SYM = 6
    PER_BATCH_IC_BLOCK_SYM = 7


class WoqWeightQScheme(IntEnum):
    UNDEFINED = 0
    ASYMMETRIC = 1
    SYMMETRIC = 2


QConfigWoq = namedtuple(
    "QConfigWoq",
    "activation weight lowp_mode act_quant_mode weight_dtype group_size cache_weight_for_large_batch weight_qscheme",
)
QConfigSmoothQuant = namedtuple("QConfigSmoothQuant", "activation weight share_weight_observers")

_FORMATS = {
    WoqWeightDtype.INT8: "int8",
    WoqWeightDtype.INT4: "int4",
    WoqWeightDtype.NF4: "nf4",
    WoqWeightDtype.FP8: "fp8_e4m3",
}
_COMPUTES = {WoqLowpMode.FP16: "fp16", WoqLowpMode.BF16: "bf16", WoqLowpMode.INT8: "int8"}
# NONE: what activations are.
_BY_ACTIVATION = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_OBSERVERS = ("act_observer", "act_ic_observer", "wei_observer", "wei_ic_observer")
_ENDS = "the ends of inputs and weights are what smoothing is made of"
_SHARED = "factors are folded into the weight before, which all linears of one input share"
# Old spellings, of before that library had its own enumeration.
_OF_TORCH = {torch.qint8: WoqWeightDtype.INT8, torch.quint4x2: WoqWeightDtype.INT4}


class SmoothQuantActivationObserver(MinMaxObserver):
    """Says how inputs shall be smoothed. lowbit observes the ends of every input itself."""

    def __init__(self, alpha: float = 0.5, dtype: torch.dtype = torch.quint8, **options: Any) -> None:
        super().__init__(dtype=dtype, **options)
        self.alpha, self.smooth_quant_enabled = alpha, True


class SmoothQuantWeightObserver(PerChannelMinMaxObserver):
    """Says that weights are multiplied by the factors of their inputs."""

    def __init__(self, alpha: float = 0.5, dtype: torch.dtype = torch.qint8, **options: Any) -> None:
        super().__init__(dtype=dtype, qscheme=torch.per_channel_symmetric, **options)
        self.alpha, self.smooth_quant_enabled = alpha, True


_default_weight = PerChannelMinMaxObserver.with_args(dtype=torch.qint8, qscheme=torch.per_channel_symmetric)
default_static_qconfig: Any = QConfig(HistogramObserver.with_args(reduce_range=False), _default_weight)  # type: ignore[no-untyped-call]
default_static_qconfig_mapping = QConfigMapping().set_global(default_static_qconfig)
default_dynamic_qconfig: Any = QConfig(  # type: ignore[no-untyped-call]
    PlaceholderObserver.with_args(dtype=torch.float, is_dynamic=True), _default_weight
)
default_dynamic_qconfig_mapping = QConfigMapping().set_global(default_dynamic_qconfig)


def get_smooth_quant_qconfig_mapping(
    alpha: float = 0.5,
    act_observer: Any = None,
    act_ic_observer: Any = None,
    wei_observer: Any = None,
    wei_ic_observer: Any = None,
    share_weight_observers: bool = True,
) -> QConfigMapping:
    """8 bits for weights and activations, with fixed ranges and smoothing."""
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 <= alpha <= 1:
        raise StageError(
            f"get_smooth_quant_qconfig_mapping takes an alpha from 0 to 1, not {alpha!r}; autotune tries several"
        )
    for name, value in zip(_OBSERVERS, (act_observer, act_ic_observer, wei_observer, wei_ic_observer), strict=True):
        if value is not None:
            say_ignored("get_smooth_quant_qconfig_mapping", name, _ENDS)
    if not share_weight_observers:
        say_ignored("get_smooth_quant_qconfig_mapping", "share_weight_observers", _SHARED)
    config: Any = QConfigSmoothQuant(
        SmoothQuantActivationObserver.with_args(alpha=float(alpha)),
        SmoothQuantWeightObserver.with_args(alpha=float(alpha)),
        share_weight_observers,
    )
    return QConfigMapping().set_global(config)


def get_weight_only_quant_qconfig_mapping(
    *,
    weight_dtype: Any = WoqWeightDtype.INT8,
    lowp_mode: int = WoqLowpMode.NONE,
    act_quant_mode: int = WoqActQuantMode.PER_BATCH_IC_BLOCK_SYM,
    group_size: int = -1,
    weight_qscheme: int = WoqWeightQScheme.UNDEFINED,
) -> QConfigMapping:
    """A number format for weights, and what products are computed in."""
    if isinstance(weight_dtype, torch.dtype) and weight_dtype in _OF_TORCH:
        kind = _OF_TORCH[weight_dtype]
        say_once(f"{weight_dtype} for weights alone is WoqWeightDtype.{kind.name} today")
        weight_dtype = kind
    dtype, mode = _member(WoqWeightDtype, weight_dtype), _member(WoqLowpMode, lowp_mode)
    scheme, rounding = _member(WoqWeightQScheme, weight_qscheme), _member(WoqActQuantMode, act_quant_mode)
    if type(group_size) is not int or (group_size != -1 and (group_size < 1 or group_size & (group_size - 1))):
        raise StageError(f"group_size is -1 for whole rows or a power of 2, not {group_size!r}")
    whole = dtype in (WoqWeightDtype.NF4, WoqWeightDtype.FP8)
    must = whole or (dtype is WoqWeightDtype.INT8 and mode is WoqLowpMode.INT8)
    if must and scheme is WoqWeightQScheme.ASYMMETRIC:
        why = f"{dtype.name} has no zero points" if whole else "8-bit codes less a zero point do not fit int8 products"
        raise StageError(f"weight_qscheme=ASYMMETRIC with {dtype.name} and lowp_mode={mode.name}: {why}, use SYMMETRIC")
    if dtype is WoqWeightDtype.FP8 and mode is WoqLowpMode.INT8:
        raise StageError(
            "lowp_mode=INT8 with FP8 weights would round them a second time, to integers: use lowp_mode BF16 or FP16, or "
            "weight_dtype INT8"
        )
    if scheme is WoqWeightQScheme.UNDEFINED:
        scheme = WoqWeightQScheme.SYMMETRIC if must else WoqWeightQScheme.ASYMMETRIC
    if mode is not WoqLowpMode.INT8:
        rounding = WoqActQuantMode.NONE
    plain = PlaceholderObserver.with_args(dtype=torch.float, is_dynamic=False)
    config: Any = QConfigWoq(plain, PerChannelMinMaxObserver, mode, rounding, dtype, group_size, False, scheme)
    return QConfigMapping().set_global(config)


def _member(kind: type[IntEnum], value: Any) -> Any:
    try:
        return kind(value)
    except ValueError:
        known = {f"{kind.__name__}.{member.name}" for member in kind}
        if isinstance(value, str) and f"{kind.__name__}.{value.upper()}" in known:
            raise StageError(f"{value!r} is a text: write {kind.__name__}.{value.upper()}") from None
        raise StageError(f"{value!r} is no {kind.__name__}: {nearest(str(value), known)}") from None


# --- reading ---------------------------------------------------------------------------------------------------------


def settings_of(configure: Any, caller: str) -> Any:
    """What a mapping or a plain QConfig says for the whole model."""
    if isinstance(configure, QConfigMapping):
        return configure.global_qconfig
    if hasattr(configure, "activation") and hasattr(configure, "weight"):
        return configure
    raise StageError(
        f"{caller} takes a configuration of ipex.quantization (get_weight_only_quant_qconfig_mapping and its like), "
        f"not a {type(configure).__name__}"
    )


def is_weight_only(settings: Any) -> bool:
    return hasattr(settings, "lowp_mode")


def is_dynamic(settings: Any) -> bool:
    return bool(getattr(settings.activation(), "is_dynamic", False))


def smoothing_of(settings: Any) -> float | None:
    """The alpha of a configuration that smooths; None for one that does not."""
    observer = settings.activation()
    return observer.alpha if isinstance(observer, SmoothQuantActivationObserver) else None


def left_out(configure: Any) -> list[str]:
    """Modules that a mapping gives no configuration, by name."""
    if not isinstance(configure, QConfigMapping):
        return []
    return [name for name, settings in configure.module_name_qconfigs.items() if settings is None]


def format_of(settings: Any) -> Format:
    """The number format that a configuration for weights alone means."""
    symmetric = settings.weight_qscheme != WoqWeightQScheme.ASYMMETRIC
    changes = {} if symmetric else {"symmetric": False}
    return as_format(_FORMATS[settings.weight_dtype]).replace(group_size=settings.group_size, **changes)


def compute_of(settings: Any, dtype: torch.dtype) -> str:
    """What products are computed in, in a model of a type."""
    return _COMPUTES.get(settings.lowp_mode) or _BY_ACTIVATION[dtype]


def observer_settings(settings: Any) -> dict[str, dict[str, Any]]:
    """What a summary says of the observers."""
    return {
        "activation_observer": _describe(settings.activation()),
        "weight_observer": _describe(settings.weight()),
    }


def _describe(observer: Any) -> dict[str, Any]:
    kept = ("smooth_quant_enabled", "dtype", "qscheme", "reduce_range", "quant_min", "quant_max", "alpha", "ch_axis")
    found: dict[str, Any] = {"name": type(observer).__name__}
    for name in kept:
        if hasattr(observer, name):
            value = getattr(observer, name)
            found[name] = value if isinstance(value, bool | int | float | str) or value is None else str(value)
    return found


__getattr__ = refuse_unknown(__name__, {})

_PLACE = "intel_extension_for_pytorch.quantization"
_UNIT = "tests/unit/test_compat_ipex_quantization.py::"
_WOQ = f"{_PLACE}.get_weight_only_quant_qconfig_mapping"
_SMOOTH = f"{_PLACE}.get_smooth_quant_qconfig_mapping"
_CONTRADICTS = f"{_UNIT}test_configurations_that_contradict_themselves"
NAMES = (
    Name(_WOQ, "lowbit.optimize_model", WORKS, f"{_UNIT}test_every_weight_type_in_every_lowp_mode"),
    *(
        Name(f"{_WOQ}({name}=)", "", WORKS, f"{_UNIT}{test}")
        for name, test in (
            ("weight_dtype", "test_every_weight_type_in_every_lowp_mode"),
            ("lowp_mode", "test_every_weight_type_in_every_lowp_mode"),
            ("act_quant_mode", "test_activations_are_rounded_as_the_mode_says"),
            ("group_size", "test_groups_and_schemes_become_formats"),
            ("weight_qscheme", "test_groups_and_schemes_become_formats"),
        )
    ),
    Name(_SMOOTH, "", WORKS, f"{_UNIT}test_two_stages", "w8a8_static with the scaler smoothquant"),
    *(Name(f"{_SMOOTH}({name}=)", "", IGNORED, _CONTRADICTS, _ENDS) for name in _OBSERVERS),
    Name(f"{_SMOOTH}(share_weight_observers=)", "", IGNORED, _CONTRADICTS, _SHARED),
    Name(f"{_SMOOTH}(alpha=)", "", WORKS, f"{_UNIT}test_two_stages"),
    Name(f"{_PLACE}.QConfigSmoothQuant", "", WORKS, f"{_UNIT}test_two_stages"),
    *(
        Name(f"{_PLACE}.{name}", "", WORKS, f"{_UNIT}test_groups_and_schemes_become_formats")
        for name in ("QConfigWoq", "WoqActQuantMode", "WoqLowpMode", "WoqWeightDtype", "WoqWeightQScheme")
    ),
    *(
        Name(f"{_PLACE}.default_{kind}", "", WORKS, f"{_UNIT}{test}")
        for kind, test in (
            ("static_qconfig", "test_static_ranges_come_from_the_observer"),
            ("static_qconfig_mapping", "test_static_ranges_come_from_the_observer"),
            ("dynamic_qconfig", "test_dynamic_needs_no_calibration"),
            ("dynamic_qconfig_mapping", "test_dynamic_needs_no_calibration"),
        )
    ),
)
