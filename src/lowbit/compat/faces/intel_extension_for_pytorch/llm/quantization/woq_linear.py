"""`IPEXWeightOnlyQuantizedLinear.from_weight`: for those who load a model layer by layer."""

from __future__ import annotations

from enum import IntEnum
from typing import Any

import torch
from torch import nn

from lowbit.compat.faces.intel_extension_for_pytorch.nn.modules.weight_only_quantization import (
    WeightOnlyQuantizedLinear,
)
from lowbit.compat.missing import refuse_unknown
from lowbit.compat.names import WORKS, Name


class QuantMethod(IntEnum):
    GPTQ_GEMM = 0
    AWQ_GEMM = 1


class QuantDtype(IntEnum):
    INT4 = 0


class IPEXWeightOnlyQuantizedLinear(nn.Module):
    """A module around the linear that does the work."""

    def __init__(self, woq_linear_impl: nn.Module) -> None:
        super().__init__()
        self.woq_linear_impl = woq_linear_impl

    @classmethod
    def from_weight(cls, *args: Any, **kwargs: Any) -> IPEXWeightOnlyQuantizedLinear:
        """From qweight, scales and zero_points in GPTQ's or AWQ's layout."""
        return cls(WeightOnlyQuantizedLinear.from_weight(*args, **kwargs))

    def forward(self, x: torch.Tensor, **_: Any) -> torch.Tensor:
        y: torch.Tensor = self.woq_linear_impl(x)
        return y


__getattr__ = refuse_unknown(__name__, {})

_PLACE = "intel_extension_for_pytorch.llm.quantization"
_TEST = "tests/unit/test_compat_ipex_quantization.py::test_linears_made_by_hand"
NAMES = (
    Name(f"{_PLACE}.IPEXWeightOnlyQuantizedLinear", "", WORKS, _TEST),
    Name(f"{_PLACE}.QuantMethod", "", WORKS, _TEST),
    Name(f"{_PLACE}.QuantDtype", "", WORKS, _TEST),
)
