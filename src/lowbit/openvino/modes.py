"""What can be asked of `compress_weights`, in the words that users of OpenVINO know, and what each word means here.

mode          format                          groups of     the rest
INT8_*        int8_channel, int8_asym_channel  a row         -
INT4_*        int4, int4_asym                  128           int8
INT3_SYM      int3, which OpenVINO holds in 4-bit numbers    int8
INT2_SYM      int2                             128           int8
NF4, FP4      nf4, fp4_e2m1                    128           int8
MXFP4         mxfp4                            32            mxfp8
NVFP4         nvfp4                            16            fp8
FP8, MXFP8    fp8_e4m3, mxfp8                  a row, 32     widened by the plugins at each inference
CB4           16 numbers of 8-bit floats       128           int8; plain in memory: plugins know NF4's table alone
CODEBOOK      a table of the caller's          128           the same
ADAPTIVE_...  16 numbers of each weight's own  128           the same
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from lowbit.errors import RecipeError, nearest
from lowbit.formats import PER_CHANNEL, Format, format_from_name


class CompressWeightsMode(Enum):
    """How most weights are stored."""

    INT8_SYM = "int8_sym"
    INT8_ASYM = "int8_asym"
    INT8 = "int8"
    INT4_SYM = "int4_sym"
    INT4_ASYM = "int4_asym"
    INT3_SYM = "int3_sym"
    INT2_SYM = "int2_sym"
    NF4 = "nf4"
    FP4 = "fp4"
    MXFP4 = "mxfp4"
    NVFP4 = "nvfp4"
    FP8_E4M3 = "fp8_e4m3"
    MXFP8_E4M3 = "mxfp8_e4m3"
    CB4 = "cb4"
    CB4_F8E4M3 = "cb4_f8e4m3"
    CODEBOOK = "codebook"
    ADAPTIVE_CODEBOOK = "adaptive_codebook"


class BackupMode(Enum):
    """How the weights are stored that the mode does not get: embeddings, convolutions, the last product, those beyond the ratio."""

    NONE = "none"
    INT8_SYM = "int8_sym"
    INT8_ASYM = "int8_asym"
    FP8_E4M3 = "fp8_e4m3"
    MXFP8_E4M3 = "mxfp8_e4m3"


class SensitivityMetric(Enum):
    """By what it is said which weights hurt most; all but the first need a dataset."""

    WEIGHT_QUANTIZATION_ERROR = "weight_quantization_error"
    HESSIAN_INPUT_ACTIVATION = "hessian_input_activation"
    MEAN_ACTIVATION_VARIANCE = "mean_activation_variance"
    MAX_ACTIVATION_VARIANCE = "max_activation_variance"
    MEAN_ACTIVATION_MAGNITUDE = "mean_activation_magnitude"


class GroupSizeFallbackMode(Enum):
    """What becomes of a weight that the group size does not divide."""

    ERROR = "error"
    IGNORE = "ignore"
    ADJUST = "adjust"


@dataclass(frozen=True)
class IgnoredScope:
    """Weights that stay as they are: names, patterns of names, types of operations."""

    names: list[str] = field(default_factory=list)
    patterns: list[str] = field(default_factory=list)
    types: list[str] = field(default_factory=list)
    validate: bool = True

    def holds(self, names: Iterable[str], kinds: Iterable[str]) -> bool:
        names = set(names)
        return bool(
            names & set(self.names)
            or set(kinds) & set(self.types)
            or any(re.fullmatch(pattern, name) for pattern in self.patterns for name in names)
        )


class Dataset:
    """Inputs to calibrate on: any iterable, and how one of its items becomes the inputs of the model."""

    def __init__(self, data_source: Iterable[Any], transform_func: Callable[[Any], Any] | None = None) -> None:
        self.data_source, self.transform_func = data_source, transform_func

    def get_data(self, indices: list[int] | None = None) -> Iterator[Any]:
        """The items as they are."""
        chosen = None if indices is None else set(indices)
        return (item for index, item in enumerate(self.data_source) if chosen is None or index in chosen)

    def get_inference_data(self, indices: list[int] | None = None) -> Iterator[Any]:
        """The items as the model takes them."""
        return map(self.transform_func or (lambda item: item), self.get_data(indices))


@dataclass(frozen=True)
class GPTQParams:
    """Of GPTQ: the share of the mean diagonal that is added to the Hessian, and how many columns are rounded at a time."""

    damp_percent: float = 0.1
    block_size: int = 128
    subset_size: int = 128


@dataclass(frozen=True)
class AdaptiveCodebookParams:
    """Of tables that each weight has of its own: the type of their numbers (f8e4m3, f16, f32), and how many there are."""

    value_type: str = "f8e4m3"
    across_blocks: bool = False
    num_elements: int = 16


@dataclass(frozen=True)
class AdvancedCompressionParameters:
    """Rare choices. By default a group size that does not divide a weight is halved until it does, and the report says so."""

    group_size_fallback_mode: GroupSizeFallbackMode = GroupSizeFallbackMode.ADJUST
    min_adjusted_group_size: int = 32
    gptq_params: GPTQParams = field(default_factory=GPTQParams)
    statistics_path: str | None = None
    codebook: Any = None
    adaptive_codebook_params: AdaptiveCodebookParams = field(default_factory=AdaptiveCodebookParams)


@dataclass(frozen=True)
class ModeRow:
    """A mode: its format in groups of some size, or the label of its table, the size that it has by itself, and its backup."""

    format: str
    group_size: int
    backup: BackupMode = BackupMode.INT8_ASYM
    sizes_fixed: bool = False


_M = CompressWeightsMode
_8_BIT = (_M.INT8_SYM, _M.INT8_ASYM, _M.INT8)
MODES: dict[CompressWeightsMode, ModeRow] = {
    _M.INT8_SYM: ModeRow("int8", PER_CHANNEL, BackupMode.INT8_SYM, True),
    _M.INT8_ASYM: ModeRow("int8_asym", PER_CHANNEL, sizes_fixed=True),
    _M.INT8: ModeRow("int8_asym", PER_CHANNEL, sizes_fixed=True),
    _M.INT4_SYM: ModeRow("int4", 128),
    _M.INT4_ASYM: ModeRow("int4_asym", 128),
    _M.INT3_SYM: ModeRow("int3", 128),
    _M.INT2_SYM: ModeRow("int2", 128),
    _M.NF4: ModeRow("nf4", 128),
    _M.FP4: ModeRow("fp4_e2m1", 128),
    _M.MXFP4: ModeRow("mxfp4", 32, BackupMode.MXFP8_E4M3, True),
    _M.NVFP4: ModeRow("nvfp4", 16, BackupMode.FP8_E4M3, True),
    _M.FP8_E4M3: ModeRow("fp8_e4m3", PER_CHANNEL, BackupMode.FP8_E4M3),
    _M.MXFP8_E4M3: ModeRow("mxfp8", 32, BackupMode.MXFP8_E4M3, True),
    _M.CB4: ModeRow("cb4", 128),
    _M.CB4_F8E4M3: ModeRow("cb4", 128),
    _M.CODEBOOK: ModeRow("codebook", 128),
    _M.ADAPTIVE_CODEBOOK: ModeRow("adaptive_codebook", 128),
}
TABLES = (_M.CB4, _M.CB4_F8E4M3, _M.CODEBOOK, _M.ADAPTIVE_CODEBOOK)
# The kernels of the core have no row for it, so it is no format of lowbit's own: it exists here for the plugins.
_MXFP8 = Format("mxfp8", 8, "float", table="e4m3", group_size=32, scale_dtype="e8m0")
_BACKUPS: dict[BackupMode, tuple[str, int]] = {
    BackupMode.INT8_SYM: ("int8", PER_CHANNEL),
    BackupMode.INT8_ASYM: ("int8_asym", PER_CHANNEL),
    BackupMode.FP8_E4M3: ("fp8_e4m3", PER_CHANNEL),
    BackupMode.MXFP8_E4M3: ("mxfp8", 32),
}


def is_8_bit(mode: CompressWeightsMode) -> bool:
    return mode in _8_BIT


def format_in_groups(name: str, group_size: int) -> Format:
    """The format of a row or a backup in groups of a size."""
    if name == _MXFP8.name:
        return _MXFP8
    format = format_from_name(name)
    return format if format.group_size == group_size else format.with_group(group_size)


def backup_format(mode: BackupMode) -> Format | None:
    """The format of what the mode does not get; None leaves it as it is."""
    return None if mode is BackupMode.NONE else format_in_groups(*_BACKUPS[mode])


def as_member(kind: type[Enum], value: Any) -> Any:
    """A member of one of these, given as itself, by its name or its value, or as another library's member of that name."""
    text = str(getattr(value, "value", value)).lower()
    for member in kind:
        if text in (member.value, member.name.lower()):
            return member
    known = [str(member.value) for member in kind]
    raise RecipeError(f"{kind.__name__} has no {value!r}: {nearest(text, known)}")
