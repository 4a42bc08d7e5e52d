"""`llm_convert`: a model folder as what the old library's native classes load; here a low-bit folder that everything loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lowbit.checkpoint.auto import AutoModelForCausalLM
from lowbit.compat.faces.ipex_llm.old_model import say_ignored_in
from lowbit.compat.missing import refuse_unknown
from lowbit.errors import RecipeError, nearest

FORMATS = {"int4": "q4_0", "int8": "q8_0"}
FAMILIES = ("llama", "bloom", "gptneox", "starcoder", "chatglm")
_IDLE = {
    "tmp_path": "nothing is written in between",
    "tokenizer_path": "the tokenizer beside the model is taken along",
}


def llm_convert(
    model: str | Path,
    outfile: str | Path,
    model_family: str,
    outtype: str = "int4",
    model_format: str = "pth",
    **kwargs: Any,
) -> str:
    """Convert a model folder; returns what was written in `outfile`, a folder called as the old library's file was."""
    if model_family not in FAMILIES:
        raise RecipeError(f"model_family={model_family!r}: {nearest(model_family, FAMILIES)}")
    if outtype not in FORMATS:
        raise RecipeError(f"outtype={outtype!r}: {nearest(outtype, FORMATS)}")
    if model_format not in ("pth", "gptq"):
        raise RecipeError(f"model_format={model_format!r}: use 'pth', or 'gptq' for a folder that is quantised already")
    say_ignored_in("llm_convert", kwargs, _IDLE)
    source = FORMATS[outtype] if model_format == "pth" else None
    made = AutoModelForCausalLM.from_pretrained(model, load_in_low_bit=source)
    target = Path(outfile) / f"bigdl_llm_{model_family}_{FORMATS[outtype]}.bin"
    made.save_low_bit(target)
    return str(target)


__getattr__ = refuse_unknown(__name__, {})
