"""The face of `ipex_llm` and `bigdl.llm`: low-bit models by `optimize_model` or by auto classes, QLoRA, and what scripts import.

Laid out like the old package. What computes is above: `lowbit.optimize`, `lowbit.checkpoint`, `lowbit.bridge`; here are the old
names with their parameters.
"""

from __future__ import annotations

from lowbit.compat.missing import refuse_unknown
from lowbit.compat.names import REFUSED, WORKS, Name

_NEAREST = {
    "langchain": "langchain's own classes over `lowbit.AutoModelForCausalLM`",
    "llamaindex": "LlamaIndex's own HuggingFaceLLM over `lowbit.AutoModelForCausalLM`",
    "serving": "`lowbit chat`, or transformers' own server over a folder that save_low_bit wrote",
    "vllm": "vLLM itself on a folder that save_low_bit wrote: it is compressed-tensors' form",
    "cli": "`lowbit chat` and `lowbit quantize`, or `python -m lowbit.compat llm-cli`",
    "gptq": "lowbit.AutoModelForCausalLM.from_pretrained",
}

__all__ = ["llm_convert", "llm_patch", "llm_unpatch", "optimize_model"]
__getattr__ = refuse_unknown(
    __name__,
    _NEAREST,
    {
        "optimize_model": f"{__name__}.optimize",
        "llm_patch": f"{__name__}.llm_patching",
        "llm_unpatch": f"{__name__}.llm_patching",
        "llm_convert": f"{__name__}.convert_model",
    },
)

_UNIT = "tests/unit/test_compat_bigdl.py::"
_ONE_BY_ONE = "tests/unit/test_compat_bigdl_names.py::"
_PROGRAMS = "tests/unit/test_compat_programs.py::test_"
_AS_PROGRAM = "`python -m lowbit.compat` in front of the line"
_OPTIMIZE = f"{_UNIT}test_optimize_model_saves_and_loads_as_the_guide_does"
_CONVERT = f"{_ONE_BY_ONE}test_llm_convert_and_the_native_classes"
NAMES = (
    Name("ipex_llm.optimize_model", "lowbit.optimize_model", WORKS, _OPTIMIZE),
    Name(
        "ipex_llm.llm_patch",
        "",
        WORKS,
        f"{_UNIT}test_llm_patch_and_unpatch",
        "transformers' own names load low-bit models",
    ),
    Name("ipex_llm.llm_unpatch", "", WORKS, f"{_UNIT}test_llm_patch_and_unpatch"),
    Name(
        "ipex_llm.llm_convert",
        "lowbit.save_low_bit",
        WORKS,
        _CONVERT,
        "it writes a low-bit folder, called as their file",
    ),
    Name(
        "llm-convert MODEL -o -x -f -t -p -k", "lowbit quantize", WORKS, f"{_PROGRAMS}convert_and_continue", _AS_PROGRAM
    ),
    Name("llm-cli -x -m -t -n -p", "lowbit generate", WORKS, f"{_PROGRAMS}convert_and_continue", _AS_PROGRAM),
    Name("llm-chat -x -m -t", "lowbit chat", WORKS, f"{_PROGRAMS}chat", _AS_PROGRAM),
    Name(
        "ipex-llm-init, bigdl-llm-init",
        "lowbit doctor",
        REFUSED,
        f"{_PROGRAMS}setting_up",
        "there is nothing to set: lowbit chooses threads and memory itself; `python -m lowbit.compat ipex-llm-init` says so",
    ),
    *(
        Name(f"ipex_llm.{name}", "", REFUSED, f"{_ONE_BY_ONE}test_what_is_not_there_says_what_to_use", f"use {instead}")
        for name, instead in _NEAREST.items()
    ),
)
