"""`ipex.nn.utils`: conversions of modules, which nothing here needs."""

from __future__ import annotations

from lowbit.compat.missing import refuse_unknown

__getattr__ = refuse_unknown(__name__, {"_weight_prepack": "ipex.optimize, or ipex.llm.optimize"})
