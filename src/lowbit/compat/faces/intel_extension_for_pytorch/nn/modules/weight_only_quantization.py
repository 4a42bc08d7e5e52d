"""`WeightOnlyQuantizedLinear`: a low-bit linear that shows what that library's did.

weight                 the codes: int8 [out, in] (INT8), uint8 [out, in / 2] (INT4 and NF4), float8_e4m3fn [out, in] (FP8)
_lowp_mode, _act_quant_mode, _group_size, _weight_qscheme, dtype
from_float, from_float_and_qweight, from_weight
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lowbit.bits import unpack_codes
from lowbit.compat.faces.intel_extension_for_pytorch.quantization import _qconfig as configs
from lowbit.compat.faces.intel_extension_for_pytorch.quantization._qconfig import (
    StageError,
    WoqActQuantMode,
    WoqLowpMode,
    WoqWeightDtype,
    WoqWeightQScheme,
)
from lowbit.compat.missing import refuse_unknown
from lowbit.compat.names import WORKS, Name
from lowbit.formats import Format
from lowbit.grid import quantize
from lowbit.interop.awq import read_awq
from lowbit.interop.gptq import read_gptq
from lowbit.layers import LowBitLinear, PackedWeight
from lowbit.packing import PackedTensor
from lowbit.search import Search

_MIDDLE = 128


class WeightOnlyQuantizedLinear(LowBitLinear):
    """y = x W^T + b over a packed weight, under that library's name."""

    def __init__(self, packed_weight: PackedWeight, bias: torch.Tensor | None = None, settings: Any = None) -> None:
        super().__init__(packed_weight, bias)
        format = packed_weight.format
        self.stands_for = "Linear"
        self._lowp_mode = WoqLowpMode(getattr(settings, "lowp_mode", WoqLowpMode.NONE))
        self._act_quant_mode = WoqActQuantMode(getattr(settings, "act_quant_mode", WoqActQuantMode.NONE))
        self._group_size = format.group_size
        symmetric = format.symmetric
        self._weight_qscheme = WoqWeightQScheme.SYMMETRIC if symmetric else WoqWeightQScheme.ASYMMETRIC
        self.dtype = dtype_of(format)

    @classmethod
    def over(cls, layer: LowBitLinear, settings: Any) -> WeightOnlyQuantizedLinear:
        """The same weight and bias, shown in this way."""
        made = cls(layer.packed_weight, layer.bias, settings)
        made.stands_for = getattr(layer, "stands_for", "Linear")
        return made

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """The codes, as that library lays them out; made anew at each read."""
        return shown_codes(self.packed_weight.packed())

    @classmethod
    def from_float(cls, mod: nn.Linear, scales: Any = None, zero_points: Any = None) -> nn.Module:
        """A dense linear packed as its `qconfig` says; without one it stays as it is."""
        settings = getattr(mod, "qconfig", None)
        if settings is None or not configs.is_weight_only(settings):
            return mod
        if scales is not None or zero_points is not None:
            raise StageError("from_float finds scales itself: from_float_and_qweight takes codes with their scales")
        packed = quantize(mod.weight.detach().float(), configs.format_of(settings), Search())
        held = PackedWeight(packed, mod.weight.dtype)
        held.compute = configs.compute_of(settings, mod.weight.dtype)
        return cls(held, mod.bias, settings)

    @classmethod
    def from_float_and_qweight(
        cls,
        mod: nn.Linear,
        qweight: torch.Tensor,
        dtype: Any = WoqWeightDtype.INT4,
        scales: Any = None,
        zero_points: Any = None,
        bias: torch.Tensor | None = None,
        group_size: int = -1,
        g_idx: torch.Tensor | None = None,
        **_: Any,
    ) -> WeightOnlyQuantizedLinear:
        """Codes in GPTQ's layout, in the place of a dense linear."""
        shape = (mod.out_features, mod.in_features)
        packed = _read(0, shape, qweight, scales, zero_points, g_idx)
        held = PackedWeight(packed, mod.weight.dtype)
        settings = getattr(mod, "qconfig", None)
        if settings is not None and configs.is_weight_only(settings):
            held.compute = configs.compute_of(settings, mod.weight.dtype)
        return cls(held, mod.bias if bias is None else bias, settings)

    from_float_and_int4_weight = from_float_and_qweight

    @classmethod
    def from_weight(
        cls,
        qweight: torch.Tensor,
        scales: torch.Tensor,
        zero_points: torch.Tensor | None,
        in_features: int,
        out_features: int,
        qconfig: Any = None,
        bias: torch.Tensor | None = None,
        group_size: int = -1,
        g_idx: torch.Tensor | None = None,
        dtype: int = 0,
        quant_method: int = 0,
        **_: Any,
    ) -> WeightOnlyQuantizedLinear:
        """Codes in GPTQ's layout (quant_method 0) or AWQ's (1)."""
        settings = None if qconfig is None else configs.settings_of(qconfig, "from_weight")
        held = PackedWeight(_read(quant_method, (out_features, in_features), qweight, scales, zero_points, g_idx))
        if settings is not None:
            held.compute = configs.compute_of(settings, torch.float32)
        return cls(held, bias, settings)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, dtype={self.dtype.name.lower()}, lowp_mode={self._lowp_mode.name.lower()}"


def _read(
    method: int, shape: tuple[int, int], qweight: torch.Tensor, scales: Any, zeros: Any, g_idx: Any
) -> PackedTensor:
    parts = {"qweight": qweight, "scales": scales, "qzeros": zeros, "g_idx": g_idx}
    known = {name: tensor for name, tensor in parts.items() if tensor is not None}
    return read_awq("from_weight", known, shape) if method == 1 else read_gptq("from_weight", known, shape)


def dtype_of(format: Format) -> WoqWeightDtype:
    """That library's word for a format; integers of fewer bits count as four."""
    if format.kind == "int":
        return WoqWeightDtype.INT8 if format.bits == 8 else WoqWeightDtype.INT4
    return WoqWeightDtype.NF4 if format.bits == 4 else WoqWeightDtype.FP8


def shown_codes(packed: PackedTensor) -> torch.Tensor:
    """Codes in plain types: whole bytes, or two to a byte, the first in the lower half."""
    format, inputs = packed.format, packed.shape[-1]
    codes = unpack_codes(packed.codes, format.bits, inputs)
    if format.bits == 8 and format.kind == "float":
        return codes.view(torch.float8_e4m3fn)
    if format.bits == 8:
        return (codes.to(torch.int16) - _MIDDLE).to(torch.int8)
    even = nn.functional.pad(codes, (0, inputs % 2))
    return even[..., ::2] | (even[..., 1::2] << 4)


__getattr__ = refuse_unknown(__name__, {})

_PLACE = "intel_extension_for_pytorch.nn.modules.WeightOnlyQuantizedLinear"
_UNIT = "tests/unit/test_compat_ipex_quantization.py::"
NAMES = (
    Name(_PLACE, "", WORKS, f"{_UNIT}test_every_weight_type_in_every_lowp_mode", "lowbit.layers.LowBitLinear"),
    *(
        Name(f"{_PLACE}.{name}", "", WORKS, f"{_UNIT}test_linears_made_by_hand")
        for name in ("from_float", "from_float_and_qweight", "from_weight")
    ),
)
