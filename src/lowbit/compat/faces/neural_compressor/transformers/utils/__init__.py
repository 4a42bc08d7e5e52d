"""`neural_compressor.transformers.utils`: the configurations under another name."""

from __future__ import annotations

from lowbit.compat.faces.neural_compressor.transformers import CONFIGS
from lowbit.compat.missing import refuse_unknown

__getattr__ = refuse_unknown(
    __name__, {"str2bool": "a function of the script's own"}, homes=dict.fromkeys(CONFIGS, "lowbit.configs.classes")
)
