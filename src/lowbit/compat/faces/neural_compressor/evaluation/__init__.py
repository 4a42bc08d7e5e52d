"""`neural_compressor.evaluation`: its one documented module, refused by name."""

from __future__ import annotations

from lowbit.compat.missing import refuse_unknown

__getattr__ = refuse_unknown(__name__, {})
