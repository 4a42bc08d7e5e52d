"""The face of `neural_compressor`: its transformers-like API. The rest of that library is refused with lowbit's own way."""

from __future__ import annotations

from lowbit.compat.missing import refuse_unknown

# The last release of that library with this API; scripts compare it.
__version__ = "3.10"

_PIECES = (
    "PostTrainingQuantConfig", "MixedPrecisionConfig", "quantization", "config", "common", "mix_precision", "conf", "experimental",
)  # fmt: skip
_TRAINING = ("training", "QuantizationAwareTrainingConfig", "WeightPruningConfig", "DistillationConfig")

__getattr__ = refuse_unknown(
    __name__,
    {
        **dict.fromkeys(_PIECES, "lowbit.optimize_model(model, recipe=...), or neural_compressor.transformers"),
        **dict.fromkeys(_TRAINING, "lowbit with peft: docs/quantization.md"),
        "torch": "lowbit.optimize_model(model, recipe=...), which takes any torch module, or neural_compressor.transformers",
        "tensorflow": "neural_compressor.transformers; lowbit takes torch models only",
    },
)
