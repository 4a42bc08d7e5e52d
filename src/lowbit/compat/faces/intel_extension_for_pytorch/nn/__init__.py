"""`ipex.nn`: of its modules the linear that weights alone are quantised in; the others are torch's own."""

from __future__ import annotations

from lowbit.compat.missing import refuse_unknown

_TORCH = "torch.nn and torch.compile: fused modules are made there"
__getattr__ = refuse_unknown(__name__, {"functional": _TORCH, "FrozenBatchNorm2d": "torch.nn.BatchNorm2d in eval()"})
