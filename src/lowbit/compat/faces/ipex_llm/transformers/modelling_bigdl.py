"""`ipex_llm.transformers.LlamaForCausalLM` and its kin: `native=True` is a model without torch, else the auto class."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from lowbit.compat.faces.ipex_llm import models
from lowbit.compat.faces.ipex_llm.transformers.model import AutoModel, AutoModelForCausalLM
from lowbit.compat.ignored import say_ignored
from lowbit.compat.missing import refuse_unknown
from lowbit.errors import RecipeError, nearest

_FAMILIES: dict[str, Any] = {
    "llama": models.Llama,
    "gptneox": models.Gptneox,
    "bloom": models.Bloom,
    "starcoder": models.Starcoder,
}


class _EitherClass:
    """One name for two ways to run a model."""

    family: ClassVar[str] = "llama"
    HF_Class: ClassVar[Any] = AutoModelForCausalLM

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        native: bool = True,
        dtype: str = "int4",
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """A folder that `llm_convert` wrote, or with `native=False` any model, as the auto class loads it."""
        if not native:
            return cls.HF_Class.from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        if cls.family not in _FAMILIES:
            raise RecipeError(f"a {cls.family} model has no native form: pass native=False")
        return _FAMILIES[cls.family](pretrained_model_name_or_path, **kwargs)


class LlamaForCausalLM(_EitherClass):
    family = "llama"


class GptneoxForCausalLM(_EitherClass):
    family = "gptneox"


class BloomForCausalLM(_EitherClass):
    family = "bloom"


class StarcoderForCausalLM(_EitherClass):
    family = "starcoder"


class ChatGLMForCausalLM(_EitherClass):
    family = "chatglm"
    HF_Class = AutoModel


class BigdlNativeForCausalLM:
    """The older name of the native classes, with the family as an argument."""

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, model_family: str = "llama", dtype: str = "int4", **kwargs: Any
    ) -> Any:
        if model_family not in _FAMILIES:
            raise RecipeError(f"model_family={model_family!r}: {nearest(model_family, _FAMILIES)}")
        for name in ("cache_dir", "tmp_path"):
            if kwargs.pop(name, None):
                say_ignored("from_pretrained", name, "a model is converted by llm_convert, or by save_low_bit")
        return _FAMILIES[model_family](pretrained_model_name_or_path, **kwargs)


__getattr__ = refuse_unknown(__name__, {})
