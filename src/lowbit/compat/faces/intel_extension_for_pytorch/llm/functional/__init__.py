"""`ipex.llm.functional`: the functions behind `ipex.llm.modules`, in plain torch."""

from __future__ import annotations

from lowbit.compat.missing import refuse_unknown

_HOME = "lowbit.compat.faces.intel_extension_for_pytorch.llm.functional._plain"
_NAMES = (
    "add_layer_norm",
    "add_rms_norm",
    "fast_layer_norm",
    "gelu_mul",
    "rms_norm",
    "rotary_embedding",
    "silu_mul",
    "varlen_attention",
)
_ADAPTERS = "peft, which puts adapters on lowbit's layers"
_ATTENTION = "torch.nn.functional.scaled_dot_product_attention; lowbit's engine keeps its own cache in model.generate"

__all__ = [*_NAMES]
__getattr__ = refuse_unknown(
    __name__,
    {
        "indirect_access_kv_cache_attention": _ATTENTION,
        "bgmv_shrink": _ADAPTERS,
        "bgmv_expand": _ADAPTERS,
        "bgmv_expand_slice": _ADAPTERS,
        "sgmv_shrink": _ADAPTERS,
        "sgmv_expand": _ADAPTERS,
        "sgmv_expand_slice": _ADAPTERS,
    },
    homes=dict.fromkeys(_NAMES, _HOME),
)
