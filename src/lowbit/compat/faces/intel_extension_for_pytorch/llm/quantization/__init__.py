"""`ipex.llm.quantization`: a low-bit linear from the tensors of GPTQ or AWQ."""

from __future__ import annotations

from lowbit.compat.missing import refuse_unknown

_HOME = "lowbit.compat.faces.intel_extension_for_pytorch.llm.quantization.woq_linear"
_NAMES = ("IPEXWeightOnlyQuantizedLinear", "QuantDtype", "QuantMethod")

__all__ = ["IPEXWeightOnlyQuantizedLinear", "QuantDtype", "QuantMethod"]
__getattr__ = refuse_unknown(__name__, {}, homes=dict.fromkeys(_NAMES, _HOME))
