"""`ipex.optim`: optimizers of that library's own."""

from __future__ import annotations

from lowbit.compat.missing import refuse_unknown

__getattr__ = refuse_unknown(
    __name__, {"_lamb": "torch.optim.AdamW, or a Lamb of another package", "Lamb": "torch.optim.AdamW"}
)
