"""`ipex_llm.ggml`: the table of types."""

from __future__ import annotations

from lowbit.compat.missing import refuse_unknown

__getattr__ = refuse_unknown(
    __name__,
    {"model": "lowbit.runtime.load", "convert": "lowbit.save_low_bit", "convert_model": "ipex_llm.llm_convert"},
)
