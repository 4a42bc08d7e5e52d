"""`ipex.quantization`: configurations, and the two stages `prepare` and `convert`."""

from __future__ import annotations

from lowbit.compat.missing import refuse_unknown

_HERE = "lowbit.compat.faces.intel_extension_for_pytorch.quantization"
_QCONFIG = (
    "QConfigSmoothQuant",
    "QConfigWoq",
    "WoqActQuantMode",
    "WoqLowpMode",
    "WoqWeightDtype",
    "WoqWeightQScheme",
    "default_dynamic_qconfig",
    "default_dynamic_qconfig_mapping",
    "default_static_qconfig",
    "default_static_qconfig_mapping",
    "get_smooth_quant_qconfig_mapping",
    "get_weight_only_quant_qconfig_mapping",
)
_HELPERS = ("dequantize_per_block", "dequantize_per_channel", "quantize_per_block", "quantize_per_channel")
_HOMES = (
    dict.fromkeys(_QCONFIG, f"{_HERE}._qconfig")
    | dict.fromkeys(("convert", "prepare"), f"{_HERE}._quantize")
    | {"autotune": f"{_HERE}._autotune"}
    | dict.fromkeys(_HELPERS, f"{_HERE}._quantize_utils")
)

__all__ = [*_HOMES]
__getattr__ = refuse_unknown(
    __name__,
    {
        "gptq": "neural_compressor.transformers.AutoModelForCausalLM.from_pretrained(quantization_config=GPTQConfig(...)), "
        "or lowbit.optimize_model(model, recipe='int4', rounder='gptq', calibration=...)",
        "fp8": "WoqWeightDtype.FP8, or lowbit.optimize_model(model, 'fp8_e4m3')",
    },
    homes=_HOMES,
)
