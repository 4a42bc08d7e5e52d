"""The face of `neural_compressor`: its transformers-like API. The rest of that library is refused with lowbit's own way."""

from __future__ import annotations

from lowbit.compat.missing import refuse_unknown

# The last release of that library with this API; scripts compare it.
__version__ = "3.10"

__getattr__ = refuse_unknown(
    __name__,
    {
        "torch": "lowbit.optimize_model(model, recipe=...), which takes any torch module, or neural_compressor.transformers",
        "quantization": "lowbit.optimize_model(model, recipe=...)",
        "config": "lowbit.optimize_model(model, recipe=...)",
        "training": "lowbit with peft: docs/quantization.md",
        "common": "lowbit.optimize_model(model, recipe=...)",
        "tensorflow": "neural_compressor.transformers; lowbit takes torch models only",
    },
)
