"""`neural_compressor.transformers.utils.quantization_config`: the configurations, and the words for their methods."""

from __future__ import annotations

from lowbit.compat.faces.neural_compressor.transformers import CONFIGS
from lowbit.compat.missing import refuse_unknown

__getattr__ = refuse_unknown(
    __name__,
    {"INCQuantizationConfigMixin": "lowbit.RtnConfig"},
    homes=dict.fromkeys(CONFIGS, "lowbit.configs.classes") | {"QuantizationMethod": "lowbit.configs.base"},
)
