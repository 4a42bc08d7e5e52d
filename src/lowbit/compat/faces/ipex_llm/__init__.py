"""The face of `ipex_llm` and `bigdl.llm`."""

from __future__ import annotations

from lowbit.compat.missing import refuse_unknown

__getattr__ = refuse_unknown(__name__, {})
