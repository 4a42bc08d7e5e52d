"""What the keywords of a `from_pretrained` ask for, lowbit's own and those of the systems it takes over from.

Keywords that are lowbit's are taken out of the call; all others go on to transformers untouched. One that is nearly called like
one of ours is a slip of the pen, and told as such: transformers would name a class of the model that does not take it.
"""

from __future__ import annotations

import difflib
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

from lowbit.blockwise import check_data
from lowbit.checkpoint.keywords import CHOICES, Choices, build_recipe, cast_of, refuse_idle_data
from lowbit.configs.base import WeightOnlyConfig
from lowbit.errors import RecipeError
from lowbit.formats import Format, as_format
from lowbit.recipe import Recipe

FOUR_BITS = "sym_int4"
EIGHT_BITS = "sym_int8"
# The old systems' mixed precision: a head of more bits than the rest.
_MIXED_HEAD = "q6_k"
_WITHOUT_MEANING = {
    "model_hub": "fetch the model first and pass its folder",
    "speculative": "generation takes a draft model",
    "pipeline_parallel_stages": "use tensor parallel ranks",
    "lightweight_bmm": "attention is left to the model",
    "disk_embedding": "weights stay mapped from their files until they are used",
}
# Old keywords that lowbit takes and that change nothing: kernels are chosen per layer in any case.
_ACCEPTED = ("optimize_model", "for_inference", "use_layer_wise")
_NAMES = (
    "load_in_low_bit",
    "load_in_4bit",
    "load_in_8bit",
    "modules_to_not_convert",
    "cpu_embedding",
    "embedding_qtype",
)
_FLAGS = ("mixed_precision", "allow_pickle")
_IMATRIX = "imatrix"
# The rounders that it weighs inputs for.
_WEIGHED = ("rtn", "plain_rtn")
KEYWORDS = (*_NAMES, *_FLAGS, _IMATRIX, *CHOICES, *_WITHOUT_MEANING, *_ACCEPTED)
# How much of a keyword must be the same, of 1, to be a slip: `dtype` and `torch_dtype` share 0.63, and both are right.
_SIMILAR = 0.85


@dataclass(frozen=True)
class Request:
    """What the keywords of a call ask for beyond transformers' own loading. `config` is what its recipe comes from, if any."""

    recipe: Recipe | None = None
    dtype: torch.dtype | str | None = None
    choices: Choices = field(default_factory=Choices)
    allow_pickle: bool = False
    config: WeightOnlyConfig | None = None
    imatrix: str | Path | None = None

    @classmethod
    def take(cls, kwargs: dict[str, Any]) -> Request:
        """Take lowbit's keywords out of a call's."""
        _warn_about_idle(kwargs)
        skip = kwargs.pop("modules_to_not_convert", None)
        cpu_embedding = kwargs.pop("cpu_embedding", False)
        mixed, pickles = (kwargs.pop(name, False) for name in _FLAGS)
        dtype, imatrix = kwargs.pop("torch_dtype", None), kwargs.pop(_IMATRIX, None)
        asked = {name: kwargs.pop(name) for name in CHOICES if name in kwargs}
        embedding = kwargs.pop("embedding_qtype", None)
        if embedding is not None:
            asked.setdefault("embedding", embedding)
        config = _neural_compressor(kwargs)
        low_bit, foreign_skip = _low_bit_named(kwargs)
        _refuse_slips(kwargs)
        if config is not None:
            _refuse_second_format(config, low_bit, asked.get("recipe"))
            asked |= {"recipe": config.to_recipe()}
            asked.setdefault("compute", config.compute)
            asked.setdefault("calibration", config.calibration())
        choices = Choices(**asked)
        cast = cast_of(low_bit, choices)
        if cast is not None or (low_bit is None and choices.recipe is None):
            refuse_idle_data(choices, imatrix)
            return cls(None, cast or dtype, choices, pickles)
        names = [*([skip] if isinstance(skip, str) else skip or ()), *foreign_skip]
        recipe = build_recipe(low_bit, names, cpu_embedding, choices)
        if mixed:
            recipe = _with_mixed_head(recipe)
        check_data(recipe, choices.calibration)
        if imatrix is not None and (choices.calibration is not None or recipe.rounder not in _WEIGHED):
            raise RecipeError(
                "imatrix= weighs inputs for rounding to nearest: leave out calibration= and other rounders"
            )
        return cls(recipe, dtype, choices, pickles, config, imatrix)

    @property
    def idle_on_low_bit(self) -> str:
        """What of a request comes too late for a model that is low-bit already; nothing where none is asked for."""
        if self.recipe is None:
            return ""
        parts = ["the format asked for"]
        if self.config is None and self.choices.calibration is not None:
            parts.append("calibration=")
        if self.imatrix is not None:
            parts.append("imatrix=")
        return f"{' and '.join(parts)} {'is' if len(parts) == 1 else 'are'} ignored"

    def with_dtype(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        return kwargs if self.dtype is None else {"dtype": self.dtype, **kwargs}


def _with_mixed_head(recipe: Recipe) -> Recipe:
    """A head of more bits than the rest, where it has fewer."""
    head = as_format(_MIXED_HEAD)
    if recipe.head is None or recipe.head.bits >= head.bits:
        has = "stays in full precision" if recipe.head is None else f"has {recipe.head.bits} bits"
        warnings.warn(
            f"mixed_precision gives the head {head.bits} bits and changes nothing here: it {has}", stacklevel=5
        )
        return recipe
    return recipe.replace(head=head)


def _warn_about_idle(kwargs: dict[str, Any]) -> None:
    """Take out the keywords that change nothing here, and say so where they ask for something."""
    for name, fix in _WITHOUT_MEANING.items():
        given = kwargs.pop(name, None)
        # One stage and the usual hub are what happens anyway; True is not one stage, though it equals 1.
        if given is True or given not in (None, False, 1, "huggingface"):
            warnings.warn(f"the keyword {name!r} has no meaning here and is ignored: {fix}", stacklevel=4)
    for name in _ACCEPTED:
        kwargs.pop(name, None)


def _low_bit_named(kwargs: dict[str, Any]) -> tuple[str | Format | None, list[str]]:
    """The format that load_in_4bit, load_in_low_bit or a BitsAndBytesConfig asks for, and the modules which the last leaves out."""
    low_bit = kwargs.pop("load_in_low_bit", None)
    four, eight = kwargs.pop("load_in_4bit", False), kwargs.pop("load_in_8bit", False)
    if low_bit is not None:
        return low_bit, []
    if four or eight:
        return FOUR_BITS if four else EIGHT_BITS, []
    config = bitsandbytes_config(kwargs.get("quantization_config"))
    if config is None:
        return None, []
    kwargs.pop("quantization_config")
    skip = list(config.llm_int8_skip_modules or ["lm_head"])
    if config.load_in_8bit:
        return EIGHT_BITS, skip
    if not config.load_in_4bit:
        return None, []
    double = "_dq" if config.bnb_4bit_use_double_quant else ""
    kind = config.bnb_4bit_quant_type
    return {"nf4": "nf4" + double, "fp4": "fp4" + double, "int4": FOUR_BITS}.get(kind, kind), skip


def _neural_compressor(kwargs: dict[str, Any]) -> WeightOnlyConfig | None:
    """The configuration of Neural Compressor that a call gives, taken out of its keywords."""
    config = kwargs.get("quantization_config")
    return kwargs.pop("quantization_config") if isinstance(config, WeightOnlyConfig) else None


def _refuse_second_format(config: WeightOnlyConfig, low_bit: str | Format | None, recipe: Recipe | str | None) -> None:
    """Refuse a keyword that says how the model is packed otherwise than the configuration does."""
    bits = config.to_recipe().linear.bits
    second = low_bit if low_bit is not None else recipe
    if second is not None and second != {4: FOUR_BITS, 8: EIGHT_BITS}.get(bits):
        name = second.name if isinstance(second, Format | Recipe) else second
        raise RecipeError(
            f"quantization_config={type(config).__name__}(bits={bits}, ...) and {name!r} both say how the model is packed: "
            "leave one of them out"
        )


def bitsandbytes_config(config: Any) -> transformers.BitsAndBytesConfig | None:
    """The configuration for bitsandbytes that a call gives, as an object or as its fields."""
    if isinstance(config, transformers.BitsAndBytesConfig):
        return config
    if isinstance(config, dict) and (config.keys() & {"load_in_4bit", "load_in_8bit"}):
        return transformers.BitsAndBytesConfig.from_dict(config)
    return None


def _refuse_slips(kwargs: dict[str, Any]) -> None:
    for name in kwargs:
        close = difflib.get_close_matches(name, KEYWORDS, n=1, cutoff=_SIMILAR)
        if close:
            raise RecipeError(f"from_pretrained has no keyword {name!r}: did you mean {close[0]!r}?")
