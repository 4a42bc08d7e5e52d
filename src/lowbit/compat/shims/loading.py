"""Keywords of from_pretrained that transformers no longer takes."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

from lowbit.compat.replacing import Replacement
from lowbit.compat.shims.shim import Keyword, dropped, renamed, say, translated

FORMATS = {"load_in_4bit": "nf4", "load_in_8bit": "int8"}
# What bitsandbytes was told beside them, and lowbit does its own way.
BITSANDBYTES = ("bnb_4bit_compute_dtype", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "llm_int8_threshold")


def _packed(low_bit: str) -> Keyword:
    name = next(keyword for keyword, known in FORMATS.items() if known == low_bit)

    def ask(value: Any) -> Mapping[str, Any]:
        if not value:
            return {}
        from lowbit.checkpoint.hf import LowBitConfig
        from lowbit.recipe import recipe_named

        return {"quantization_config": LowBitConfig(recipe=recipe_named(low_bit))}

    return Keyword(name, f"was bitsandbytes'; lowbit packs the weights as {low_bit}", ask)


KEYWORDS = {
    keyword.old: keyword
    for keyword in (
        *(_packed(low_bit) for low_bit in FORMATS.values()),
        *(dropped(name, "it was bitsandbytes', and lowbit packs the weights") for name in BITSANDBYTES),
        renamed("use_auth_token", "token"),
        dropped("resume_download", "downloads are always resumed"),
        dropped("torchscript", "outputs can be indexed like the tuples that they were"),
        Keyword(
            "use_flash_attention_2",
            'is attn_implementation today; torch\'s own attention ("sdpa") is the one that runs everywhere',
            lambda value: {"attn_implementation": "sdpa"} if value else {},
        ),
    )
}


def from_pretrained(module: ModuleType) -> Iterator[Replacement]:
    """The auto classes end here too, with what they did not use themselves."""
    cls = module.PreTrainedModel
    original = vars(cls)["from_pretrained"].__func__

    @functools.wraps(original)
    def from_pretrained_of_old(cls: type, *args: Any, **kwargs: Any) -> Any:
        return original(cls, *args, **_packed_by_us(translated("from_pretrained", KEYWORDS, kwargs)))

    yield Replacement(cls, "from_pretrained", classmethod(from_pretrained_of_old))


def _packed_by_us(given: dict[str, Any]) -> dict[str, Any]:
    """A configuration of bitsandbytes, where that package is not installed."""
    from transformers import BitsAndBytesConfig

    config = given.get("quantization_config")
    if not isinstance(config, BitsAndBytesConfig) or importlib.util.find_spec("bitsandbytes") is not None:
        return given
    name = next((keyword for keyword in FORMATS if getattr(config, keyword)), None)
    rest = {key: value for key, value in given.items() if key != "quantization_config"}
    if name is None:
        return rest
    low_bit = FORMATS[name]
    say("quantization_config=BitsAndBytesConfig(...)", f"needs bitsandbytes; lowbit packs the weights as {low_bit}")
    return {**rest, **KEYWORDS[name].translate(True)}
