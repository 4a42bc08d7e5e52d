"""The face of `nncf`: the compression of weights, by lowbit's own rounding. Names, order and defaults are that package's."""

from __future__ import annotations

from lowbit.compat.missing import refuse_unknown
from lowbit.compat.names import REFUSED, WORKS, Name

# The last release that scripts were seen with; they compare it.
__version__ = "3.4.0"

ENUMERATIONS = ("BackupMode", "CompressWeightsMode", "SensitivityMetric")
_DATA = ("AdvancedCompressionParameters", "Dataset", "IgnoredScope")
_OBSERVED = "lowbit's 8 bits for weights and activations (docs/quantization.md), whose export keeps the codes"
_NEAREST = {
    "quantize": _OBSERVED,
    "quantize_with_accuracy_control": _OBSERVED,
    "QuantizationPreset": _OBSERVED,
    "TargetDevice": _OBSERVED,
    "NNCFConfig": "nncf.compress_weights, or lowbit.optimize_model for torch modules",
    "strip": "the model as it is: nothing is left to strip",
    "torch": "lowbit.optimize_model(model, ...), which takes any torch module",
}

__all__ = [*_DATA, *ENUMERATIONS, "compress_weights"]
__getattr__ = refuse_unknown(__name__, _NEAREST, dict.fromkeys(__all__, "lowbit.openvino"))

_UNIT = "tests/unit/test_compat_optimum.py::"
_REFUSED = f"{_UNIT}test_what_is_not_there_is_named"
NAMES = (
    Name(
        "nncf.compress_weights", "lowbit.openvino.compress_weights", WORKS, "tests/seeds/test_guide5.py::test_four_bits"
    ),
    *(
        Name(f"nncf.{name}", f"lowbit.openvino.{name}", WORKS, f"{_UNIT}test_classes_are_ours")
        for name in (*_DATA, *ENUMERATIONS)
    ),
    *(Name(f"nncf.{name}", "", REFUSED, _REFUSED, f"use {instead}") for name, instead in _NEAREST.items()),
)
