"""`ipex.nn.modules`."""

from __future__ import annotations

from lowbit.compat.missing import refuse_unknown

_HOME = "lowbit.compat.faces.intel_extension_for_pytorch.nn.modules.weight_only_quantization"
_TORCH = "torch.nn, and torch.compile to fuse"

__all__ = ["WeightOnlyQuantizedLinear"]
__getattr__ = refuse_unknown(
    __name__,
    {
        "MergedEmbeddingBag": "torch.nn.EmbeddingBag",
        "IPEXLinearEltwise": _TORCH,
        "FrozenBatchNorm2d": "torch.nn.BatchNorm2d",
    },
    homes={"WeightOnlyQuantizedLinear": _HOME},
)
