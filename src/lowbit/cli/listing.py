"""From stored tensors to weights: which tensors belong together, how many weights they hold, and in which format.

A quantised weight is stored as several tensors whose names share a beginning. A `Layout` is a row that says by which
tensor one project's weights are known, what stands beside it, and how to read the format from their shapes:

    lowbit               codes, scales, zeros, ...                     weight [out, in]
    compressed-tensors   weight_packed, weight_scale, weight_shape     int32 [out, in * bits / 32]
    GPTQ                 qweight, qzeros, scales, g_idx                int32 [in * bits / 32, out]
    AWQ                  qweight, qzeros, scales                       int32 [in, out * bits / 32]
    bitsandbytes         weight, weight.absmax, weight.quant_state...  uint8 [in * out / 2, 1]

What no row knows is a dense tensor in the type it is stored in.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from lowbit.contents import StoredTensor
from lowbit.errors import FormatError
from lowbit.formats import format_from_name
from lowbit.report import Report

WORD_BITS = 32
_DENSE_NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "fp8_e4m3",
    "F8_E5M2": "fp8_e5m2", "I8": "int8", "U8": "uint8", "I16": "int16", "I32": "int32", "I64": "int64", "BOOL": "bool",
}  # fmt: skip
_SCALE_SUFFIX = {"BF16": "_bf16", "F32": "_fp32"}
# Scales that stand beside a dense-looking tensor of 8 bits, by what is appended to the name of the module.
_BESIDE_DENSE = (
    ".weight_scale",
    ".weight_scale_inv",
    ".weight_zero_point",
    ".input_scale",
    ".input_zero_point",
    ".SCB",
    ".weight_format",
    ".weight_shape",
)

Parts = dict[str, StoredTensor]


@dataclass(frozen=True)
class StoredWeight:
    """One weight of a checkpoint with all that is stored for it."""

    path: str
    format: str
    shape: tuple[int, ...]
    nbytes: int

    @property
    def weights(self) -> int:
        return math.prod(self.shape)

    @property
    def bits_per_weight(self) -> float:
        return self.nbytes * 8 / max(self.weights, 1)

    def to_dict(self) -> dict[str, Any]:
        return {
            "path": self.path,
            "format": self.format,
            "shape": list(self.shape),
            "bytes": self.nbytes,
            "weights": self.weights,
            "bits_per_weight": round(self.bits_per_weight, 4),
        }


@dataclass(frozen=True)
class Hints:
    """What a folder says of its weights beside their tensors: its quantization_config, lowbit's formats and shapes, and the
    formats that the report names."""

    config: dict[str, Any] = field(default_factory=dict)
    formats: dict[str, str] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    report: dict[str, str] = field(default_factory=dict)

    @property
    def bits(self) -> int:
        """The width that the config gives for all weights; 4 if it does not say."""
        groups = self.config.get("config_groups")
        if isinstance(groups, dict) and groups:
            weights = next(iter(groups.values())).get("weights") or {}
            return int(weights.get("num_bits", 4))
        return int(self.config.get("bits", self.config.get("w_bit", 4)))


def hints_from(config: dict[str, Any], report: Report) -> Hints:
    """The hints of a quantization_config and of the report that lowbit leaves beside it."""
    layers = config.get("layers")
    formats = {path: name for name, paths in layers.items() for path in paths} if isinstance(layers, dict) else {}
    shapes = {row.path: tuple(row.shape) for row in report.layers}
    return Hints(config, formats, shapes, {row.path: row.format for row in report.layers})


@dataclass(frozen=True)
class Layout:
    """How one project stores a weight: the ending that marks it, the endings beside it, and the reader of both."""

    marker: str
    beside: tuple[str, ...]
    describe: Callable[[str, Parts, Hints], tuple[str, tuple[int, ...]]]


def int_name(
    bits: int, in_features: int, scales: StoredTensor | None, asymmetric: bool, groups: int | None = None
) -> str:
    """The name of an integer format, from what its scales look like."""
    count = groups if groups is not None else (scales.shape[-1] if scales is not None and scales.shape else 1)
    group = "_channel" if count <= 1 else f"_g{_group_size(in_features, count)}"
    suffix = _SCALE_SUFFIX.get(scales.dtype, "") if scales is not None else ""
    return _canonical(f"int{bits}{'_asym' if asymmetric else ''}{group}{suffix}")


def _group_size(in_features: int, groups: int) -> int:
    """The smallest usual group that cuts a row into so many groups, the last of which may be shorter."""
    least = -(-in_features // groups)
    return next(
        (size for size in (16, 32, 64, 128, 256, 512, 1024) if size >= least and -(-in_features // size) == groups),
        least,
    )


def _canonical(name: str) -> str:
    """The one spelling of a format's name, or the name as it is if it is none of ours."""
    try:
        return format_from_name(name).name
    except FormatError:
        return name


def _describe_compressed(path: str, parts: Parts, hints: Hints) -> tuple[str, tuple[int, ...]]:
    packed, scales = parts[".weight_packed"], parts.get(".weight_scale")
    if packed.dtype == "U8":  # two 4-bit floats in a byte
        name = "nvfp4" if ".weight_global_scale" in parts else "mxfp4"
        return name, (*packed.shape[:-1], packed.shape[-1] * 2)
    stored = parts.get(".weight_shape")
    if stored is not None and stored.dtype == "I64":
        shape = struct.unpack(f"<{stored.nbytes // 8}q", stored.read())
    else:
        bits = hints.bits
        shape = (*packed.shape[:-1], packed.shape[-1] * WORD_BITS // bits)
    bits = packed.shape[-1] * WORD_BITS // shape[-1]
    return int_name(bits, shape[-1], scales, ".weight_zero_point" in parts), shape


def _describe_qweight(path: str, parts: Parts, hints: Hints) -> tuple[str, tuple[int, ...]]:
    """GPTQ packs along the input, AWQ along the output; the scales [groups, out] tell which."""
    packed, scales, bits = parts[".qweight"], parts.get(".scales"), hints.bits
    per_word = WORD_BITS / bits
    is_awq = scales is not None and scales.shape[-1] != packed.shape[-1]
    rows, columns = packed.shape[-2:]
    shape = (round(columns * per_word), rows) if is_awq else (columns, round(rows * per_word))
    groups = scales.shape[0] if scales is not None else 1
    asymmetric = is_awq or not hints.config.get("sym", True)
    return int_name(bits, shape[1], scales, asymmetric, groups), shape


def _describe_mxfp4_blocks(path: str, parts: Parts, hints: Hints) -> tuple[str, tuple[int, ...]]:
    *outer, groups, size = parts["_blocks"].shape
    return "mxfp4", (*outer, groups * size * 2)


def _describe_lowbit(path: str, parts: Parts, hints: Hints) -> tuple[str, tuple[int, ...]]:
    """The config names the format, the report the shape. Without the report a row may seem to hold its padding too."""
    codes = parts[".codes"]
    if path not in hints.formats:
        return _DENSE_NAMES.get(codes.dtype, codes.dtype.lower()), codes.shape
    format = format_from_name(hints.formats[path])
    per_row = codes.shape[-1]
    padded = (
        per_row // format.block.bytes * format.block.weights if format.block else per_row * WORD_BITS // format.bits
    )
    return format.name, hints.shapes.get(path, (*codes.shape[:-1], padded))


_OURS = (".scales", ".zeros", ".scale_scales", ".scale_offset", ".order", ".input_range")
_COMPRESSED = (
    ".weight_scale",
    ".weight_shape",
    ".weight_zero_point",
    ".weight_g_idx",
    ".weight_global_scale",
    ".input_scale",
    ".input_global_scale",
)
LAYOUTS: tuple[Layout, ...] = (
    Layout(".codes", _OURS, _describe_lowbit),
    Layout(".weight_packed", _COMPRESSED, _describe_compressed),
    Layout(".qweight", (".qzeros", ".scales", ".g_idx"), _describe_qweight),
    Layout("_blocks", ("_scales",), _describe_mxfp4_blocks),
)
_BNB_STATE = ".weight.quant_state.bitsandbytes__"
_BNB_BESIDE = (".weight.absmax", ".weight.quant_map", ".weight.nested_absmax", ".weight.nested_quant_map")


def list_weights(tensors: list[StoredTensor], hints: Hints) -> list[StoredWeight]:
    """Every weight of a checkpoint in the order of its file."""
    left = {tensor.name: tensor for tensor in tensors}
    found: dict[str, StoredWeight] = {}
    for tensor in tensors:
        weight = _packed_weight(tensor, left, hints) or _bnb_weight(tensor, left)
        if weight is not None:
            found[tensor.name] = weight
    # Weights before what may stand beside them, whichever comes first in the file.
    for tensor in sorted(tensors, key=lambda tensor: not tensor.name.endswith(".weight")):
        if tensor.name in left:
            found[tensor.name] = _dense_weight(tensor, left, hints)
    return [found[tensor.name] for tensor in tensors if tensor.name in found]


def _packed_weight(tensor: StoredTensor, left: Parts, hints: Hints) -> StoredWeight | None:
    """The weight that a tensor marks; what belongs to it is taken out of `left`."""
    layout = next((row for row in LAYOUTS if tensor.name.endswith(row.marker)), None)
    if layout is None or tensor.name not in left:
        return None
    base = tensor.name.removesuffix(layout.marker)
    parts = {end: left.pop(base + end) for end in (layout.marker, *layout.beside) if base + end in left}
    path = base.removesuffix(".packed_weight")
    format, shape = layout.describe(path, parts, hints)
    return StoredWeight(path, format, shape, sum(part.nbytes for part in parts.values()))


def _bnb_weight(tensor: StoredTensor, left: Parts) -> StoredWeight | None:
    """bitsandbytes keeps the shape and the group in a JSON text beside the weight."""
    base, found, kind = tensor.name.partition(_BNB_STATE)
    if not found:
        return None
    state = json.loads(tensor.read())
    names = (tensor.name, base + ".weight", *(base + end for end in _BNB_BESIDE))
    size = sum(left.pop(name).nbytes for name in names if name in left)
    double = "_dq" if "nested_blocksize" in state else ""
    return StoredWeight(base, _canonical(f"{kind}_g{state['blocksize']}{double}"), tuple(state["shape"]), size)


def _dense_weight(tensor: StoredTensor, left: Parts, hints: Hints) -> StoredWeight:
    """A tensor as it is stored, with the scales that stand beside it."""
    del left[tensor.name]
    base, is_weight, _ = tensor.name.rpartition(".weight")
    beside = [left.pop(base + end) for end in _BESIDE_DENSE if is_weight and base + end in left]
    path = tensor.name.removesuffix(".weight")
    name = _DENSE_NAMES.get(tensor.dtype, tensor.dtype.lower())
    name = hints.report.get(path, name) if tensor.dtype == "I8" else name
    return StoredWeight(path, name, tensor.shape, tensor.nbytes + sum(part.nbytes for part in beside))
