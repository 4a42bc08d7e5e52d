"""`ipex.transformers`: the home of `optimize` before `ipex.llm` was."""

from __future__ import annotations

from lowbit.compat.missing import refuse_unknown

__getattr__ = refuse_unknown(
    __name__,
    {"models": "transformers' own models: lowbit changes none of their code"},
    homes={"optimize_transformers": "lowbit.compat.faces.intel_extension_for_pytorch.llm.frontend"},
)
