"""`neural_compressor.transformers.quantization`: a model that is there already, and saving."""

from __future__ import annotations

from lowbit.compat.missing import refuse_unknown

_UTILS = "lowbit.compat.faces.neural_compressor.transformers.quantization.utils"
__getattr__ = refuse_unknown(__name__, {}, homes=dict.fromkeys(("convert_to_quantized_model", "save_low_bit"), _UTILS))
