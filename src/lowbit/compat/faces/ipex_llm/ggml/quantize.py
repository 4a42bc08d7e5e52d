"""`ipex_llm.ggml.quantize`: the old names of number formats and their numbers."""

from __future__ import annotations

from lowbit.compat.missing import refuse_unknown
from lowbit.compat.names import REFUSED, WORKS, Name
from lowbit.formats import CASTS, IQ_STAND_IN, IQ_TYPES, MIXED, MIXTURES, format_from_name
from lowbit.interop.ipex_blocks import UNREADABLE
from lowbit.recipe import RECIPES

ggml_tensor_qtype = {
    "sym_int4": 2, "asym_int4": 3, "sym_int5": 6, "asym_int5": 7, "sym_int8": 8, "nf4": 10, "nf3": 11, "fp16": 12,
    "fp8_e4m3": 15, "fp4": 16, "mixed_fp4": 17, "mixed_fp8": 18, "fp8_e5m2": 19, "fp8": 19, "bf16": 20, "gguf_iq2_xxs": 21,
    "gguf_iq2_xs": 22, "q2_k": 23, "gguf_iq1_s": 24, "gguf_iq1_m": 25, "q6_k": 26, "q4_k": 27, "q5_k": 28, "fp6": 29,
    "fp6_k": 30, "sym_int4_rtn": 31, "sym_int8_rtn": 32, "asym_int4_rtn": 33, "woq_int4": 34, "torch_fp8_e5m2": 35,
    "torch_fp8": 35, "torch_fp8_e4m3": 36,
}  # fmt: skip
gguf_mixed_qtype = {"gguf_q4k_s": 101, "gguf_q4k_m": 102}

_PACKS = "tests/unit/test_compat_bigdl.py::test_every_low_bit_name_packs"
_READS = "tests/unit/test_old_saves.py::test_a_type_that_cannot_be_read_says_why"

__getattr__ = refuse_unknown(__name__, {"quantize": "lowbit.save_low_bit after lowbit.optimize_model"})


def _became(name: str) -> str:
    """What a weight of an old name is packed as."""
    if name in CASTS:
        return f"a cast to {CASTS[name]}, nothing is packed"
    if name in MIXED:
        return f"{' or '.join(MIXED[name])}, whichever is nearer to the weight"
    if name in MIXTURES:
        most, head, hurt = MIXTURES[name]
        return f"{most}, with {head} for the head and {hurt} for values and down projections"
    if name in IQ_TYPES:
        return f"{IQ_STAND_IN[0]} stands in for it, and a warning says so"
    if name in RECIPES:
        return f"the recipe {RECIPES[name].name}: {RECIPES[name].linear}, with more bits where they save most"
    return str(format_from_name(name))


NAMES = (
    *(
        Name(f'low_bit="{name}"', "lowbit.optimize_model", WORKS, _PACKS, _became(name))
        for name in ggml_tensor_qtype | gguf_mixed_qtype
    ),
    *(
        Name(f"load_low_bit of an old folder in {name}", "lowbit.load_low_bit", REFUSED, _READS, reason)
        for name, reason in UNREADABLE.items()
    ),
)
