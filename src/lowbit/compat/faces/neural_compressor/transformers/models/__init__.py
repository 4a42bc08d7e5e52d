"""`neural_compressor.transformers.models`: where the auto classes are at home."""

from __future__ import annotations

from lowbit.compat.missing import refuse_unknown

__getattr__ = refuse_unknown(__name__, {"_BaseINCAutoModelClass": "lowbit.AutoModel"})
