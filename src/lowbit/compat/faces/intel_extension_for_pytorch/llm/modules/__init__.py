"""`ipex.llm.modules`: linears with what comes after them, norms, rotary positions. Plain torch under the old names, for model code
that is written with them; `torch.compile` fuses what can be fused. Attention over that library's own caches is refused."""

from __future__ import annotations

from lowbit.compat.missing import refuse_unknown

_HOME = "lowbit.compat.faces.intel_extension_for_pytorch.llm.modules._plain"
_NAMES = (
    "FastLayerNorm",
    "Linear2SiluMul",
    "LinearAdd",
    "LinearAddAdd",
    "LinearGelu",
    "LinearMul",
    "LinearNewGelu",
    "LinearRelu",
    "LinearSilu",
    "LinearSiluMul",
    "RMSNorm",
    "RotaryEmbedding",
    "VarlenAttention",
)
_ATTENTION = "torch.nn.functional.scaled_dot_product_attention; lowbit's engine keeps its own cache in model.generate"

__all__ = [*_NAMES]
__getattr__ = refuse_unknown(
    __name__,
    {
        "IndirectAccessKVCacheAttention": _ATTENTION,
        "PagedAttention": _ATTENTION,
        "GatedMLPMOE": "transformers' own experts: lowbit.optimize_model packs them",
        "MambaMixer": "transformers' own MambaMixer",
    },
    homes=dict.fromkeys(_NAMES, _HOME),
)
