"""Codes by hand: `quantize_per_channel`, `quantize_per_block`, and the way back.

Codes are plain: int8 for INT8, two to a byte (uint8) for INT4 and NF4, float8_e4m3fn for FP8; scales [out] or [out, G], zero points
of the same shape, less the middle for INT8 (whose codes are signed), or None.
"""

from __future__ import annotations

from typing import Any

import torch

from lowbit.bits import pack_codes
from lowbit.compat.faces.intel_extension_for_pytorch.nn.modules.weight_only_quantization import shown_codes
from lowbit.compat.faces.intel_extension_for_pytorch.quantization import _qconfig as configs
from lowbit.compat.faces.intel_extension_for_pytorch.quantization._qconfig import (
    QConfigWoq,
    StageError,
    WoqWeightDtype,
    WoqWeightQScheme,
)
from lowbit.compat.missing import refuse_unknown
from lowbit.compat.names import WORKS, Name
from lowbit.formats import PER_CHANNEL, Format
from lowbit.grid import quantize, unpack
from lowbit.packing import PackedTensor
from lowbit.search import PLAIN

_MIDDLE = 128


def quantize_per_channel(
    t: torch.Tensor, dtype: int, scales: Any = None, zero_points: Any = None, sym_quant: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Codes, scales [out] and zero points of a weight [out, in]."""
    codes, found, zeros = quantize_per_block(t, dtype, PER_CHANNEL, scales, zero_points, sym_quant)
    return codes, found.view(-1), None if zeros is None else zeros.view(-1)


def quantize_per_block(
    t: torch.Tensor, dtype: int, group_size: int, scales: Any = None, zero_points: Any = None, sym_quant: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Codes, scales [out, G] and zero points of a weight [out, in]."""
    if scales is not None or zero_points is not None:
        raise StageError("quantize_per_channel and quantize_per_block find scales and zero points themselves")
    packed = quantize(t.detach().float(), _format(dtype, group_size, sym_quant), PLAIN)
    zeros = None if packed.zeros is None else packed.zeros.float() - (_MIDDLE if packed.format.bits == 8 else 0)
    return shown_codes(packed), packed.scales, zeros


def dequantize_per_channel(
    qt: torch.Tensor, scales: torch.Tensor, zps: Any, dtype: int, weight_shape: Any = None
) -> torch.Tensor:
    """The weight that codes stand for."""
    zeros = None if zps is None else zps.view(-1, 1)
    return dequantize_per_block(qt, scales.view(-1, 1), zeros, dtype, PER_CHANNEL, weight_shape)


def dequantize_per_block(
    qt: torch.Tensor, scales: torch.Tensor, zps: Any, dtype: int, group_size: int, weight_shape: Any = None
) -> torch.Tensor:
    """The weight that codes stand for."""
    format = _format(dtype, group_size, zps is None)
    if qt.dtype == torch.int8:
        codes = (qt.to(torch.int16) + _MIDDLE).to(torch.uint8)
    elif qt.dtype == torch.uint8:
        codes = torch.stack([qt & 0xF, qt >> 4], -1).flatten(-2)
    else:
        codes = qt.view(torch.uint8)
    shape = tuple(codes.shape) if weight_shape is None else tuple(weight_shape)
    codes = codes[:, : shape[1]].contiguous()
    zeros = None if zps is None else (zps + (_MIDDLE if format.bits == 8 else 0)).round().to(torch.uint8)
    return unpack(PackedTensor(format, shape, pack_codes(codes, format.bits), scales, zeros))


def _format(dtype: int, group_size: int, symmetric: bool) -> Format:
    whole = dtype in (WoqWeightDtype.NF4, WoqWeightDtype.FP8) or symmetric
    scheme = WoqWeightQScheme.SYMMETRIC if whole else WoqWeightQScheme.ASYMMETRIC
    said = QConfigWoq(None, None, None, None, WoqWeightDtype(dtype), group_size, False, scheme)
    return configs.format_of(said).replace(scale_dtype="float32")


__getattr__ = refuse_unknown(__name__, {})

_PLACE = "intel_extension_for_pytorch.quantization"
_TEST = "tests/unit/test_compat_ipex_quantization.py::test_codes_by_hand"
_FUNCTIONS = (quantize_per_channel, quantize_per_block, dequantize_per_channel, dequantize_per_block)
NAMES = tuple(Name(f"{_PLACE}.{function.__name__}", "", WORKS, _TEST) for function in _FUNCTIONS)
