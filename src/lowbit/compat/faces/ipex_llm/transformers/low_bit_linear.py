"""`ipex_llm.transformers.low_bit_linear`: the layers that scripts look for in a model, and block sizes."""

from __future__ import annotations

from lowbit.compat.missing import refuse_unknown
from lowbit.formats import IQ_STAND_IN, IQ_TYPES, MIXED, MIXTURES, format_from_name
from lowbit.layers import LowBitLinear, PackedWeight

# The packed weight of a linear: `isinstance(layer.packed_weight, FP4Params)`.
FP4Params = PackedWeight


def get_block_size(qtype: str) -> int:
    """How many weights share a scale, of an old name or one of ours."""
    key = qtype.strip().lower()
    mixed = MIXED | MIXTURES | dict.fromkeys(IQ_TYPES, IQ_STAND_IN)
    format = format_from_name(mixed[key][0] if key in mixed else key)
    return format.block.weights if format.block is not None else format.group_size


__all__ = ["FP4Params", "LowBitLinear", "get_block_size"]

__getattr__ = refuse_unknown(
    __name__,
    {
        "ggml_convert_qtype": "lowbit.optimize_model",
        "BF16Linear": "torch.nn.Linear: a bf16 layer stays one",
        "FP16Linear": "torch.nn.Linear: an fp16 layer stays one",
    },
)
