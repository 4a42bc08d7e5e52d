"""`ipex_llm.transformers.convert`: what scripts ask of it."""

from __future__ import annotations

from lowbit.compat.missing import refuse_unknown


def get_enable_ipex(_enable_ipex: bool | None = None) -> bool:
    """Whether another extension's kernels run the model: never, lowbit has its own."""
    return False


__getattr__ = refuse_unknown(
    __name__,
    {
        "ggml_convert_low_bit": "lowbit.optimize_model",
        "convert_model_hybrid": "lowbit.optimize_model: experts are packed like the rest",
    },
)
