"""`ipex.llm`: `optimize` for language models, and the modules and functions that their authors build them of."""

from __future__ import annotations

from lowbit.compat.missing import refuse_unknown

__all__ = ["functional", "modules", "optimize", "quantization", "utils"]
__getattr__ = refuse_unknown(
    __name__,
    {"generation": "model.generate: transformers' own, which lowbit's engine answers"},
    homes={"optimize": "lowbit.compat.faces.intel_extension_for_pytorch.llm.frontend"},
)
