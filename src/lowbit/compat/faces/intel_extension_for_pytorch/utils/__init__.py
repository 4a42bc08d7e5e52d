"""`ipex.utils`: inner workings, none of which scripts need."""

from __future__ import annotations

from lowbit.compat.missing import refuse_unknown

__getattr__ = refuse_unknown(
    __name__,
    {
        "weight_only_quantization": "ipex.llm.optimize(low_precision_checkpoint=...)",
        "_logger": "ipex.set_logging_level",
        "verbose": "ipex.verbose",
    },
)
