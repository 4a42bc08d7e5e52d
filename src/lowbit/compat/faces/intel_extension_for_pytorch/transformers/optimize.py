"""`ipex.transformers.optimize`: `optimize` and `optimize_transformers` by their old place."""

from __future__ import annotations

from lowbit.compat.missing import refuse_unknown

_HOME = "lowbit.compat.faces.intel_extension_for_pytorch.llm.frontend"
__getattr__ = refuse_unknown(
    __name__,
    {
        "convert_function": "a forward of your own class: lowbit changes no model's code",
        "convert_functions": "a forward of your own class: lowbit changes no model's code",
    },
    homes=dict.fromkeys(("optimize", "optimize_transformers"), _HOME),
)
