"""The ten auto classes: transformers' own, with the keywords of low-bit loading in front.

    AutoModelForCausalLM.from_pretrained(folder, load_in_4bit=True)
    AutoModelForCausalLM.from_pretrained(folder, load_in_low_bit="nf4", modules_to_not_convert=["lm_head"])
    AutoModelForCausalLM.from_pretrained("model.Q4_K_M.gguf", load_in_4bit=True)
    AutoModelForCausalLM.load_low_bit(folder)

Weights are packed while the checkpoint streams in, one at a time, so a model never lies in memory in full precision. Without a
low-bit keyword the call is transformers' own. A folder that is low-bit already loads as it is, whatever the keywords ask for.
Keywords that belong to transformers go on to it untouched.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
import transformers

from lowbit.checkpoint.devices import check_device_map
from lowbit.checkpoint.folder import check_folder, quantization_fields, refuse_pickles
from lowbit.checkpoint.gguf_source import gguf_file, lazy_tensors
from lowbit.checkpoint.hf import Job, LowBitConfig, reads
from lowbit.checkpoint.hub import find_model
from lowbit.checkpoint.keywords import CHOICES, Choices, as_dtype, build_recipe, cast_of
from lowbit.checkpoint.loading_bar import weights_bar
from lowbit.checkpoint.save import save_low_bit
from lowbit.checkpoint.verdict import check_account, check_method, one_sentence
from lowbit.contents import CONFIG, file_names, read_config
from lowbit.errors import CheckpointError
from lowbit.interop.gguf import open_gguf
from lowbit.recipe import Recipe

FOUR_BITS = "sym_int4"
EIGHT_BITS = "sym_int8"
# The old systems' mixed precision: a head of more bits than the rest.
_MIXED_HEAD = "q6_k"
_WITHOUT_MEANING = {
    "imatrix": "give the recipe an importance through calibration instead",
    "model_hub": "fetch the model first and pass its folder",
    "speculative": "generation takes a draft model",
    "pipeline_parallel_stages": "use tensor parallel ranks",
    "lightweight_bmm": "attention is left to the model",
    "disk_embedding": "weights stay mapped from their files until they are used",
}
# Old keywords that lowbit takes and that change nothing: kernels are chosen per layer in any case.
_ACCEPTED = ("optimize_model",)


@dataclass(frozen=True)
class _Request:
    """What the keywords of a call ask for beyond transformers' own loading."""

    recipe: Recipe | None = None
    dtype: torch.dtype | str | None = None
    choices: Choices = field(default_factory=Choices)
    allow_pickle: bool = False

    @classmethod
    def take(cls, kwargs: dict[str, Any]) -> _Request:
        """Take lowbit's keywords out of a call's."""
        for name, fix in _WITHOUT_MEANING.items():
            given = kwargs.pop(name, None)
            # One stage and the usual hub are what happens anyway; True is not one stage, though it equals 1.
            if given is True or given not in (None, False, 1, "huggingface"):
                warnings.warn(f"the keyword {name!r} has no meaning here and is ignored: {fix}", stacklevel=4)
        for name in _ACCEPTED:
            kwargs.pop(name, None)
        skip = kwargs.pop("modules_to_not_convert", None)
        cpu_embedding = kwargs.pop("cpu_embedding", False)
        mixed, pickles = kwargs.pop("mixed_precision", False), kwargs.pop("allow_pickle", False)
        dtype = kwargs.pop("torch_dtype", None)
        asked = {name: kwargs.pop(name) for name in CHOICES if name in kwargs and name != "torch_dtype"}
        embedding = kwargs.pop("embedding_qtype", None)
        if embedding is not None:
            asked.setdefault("embedding", embedding)
        low_bit, foreign_skip = _low_bit_named(kwargs)
        choices = Choices(**asked)
        cast = cast_of(low_bit, choices)
        if cast is not None or (low_bit is None and choices.recipe is None):
            return cls(None, cast or dtype, choices, pickles)
        names = [*([skip] if isinstance(skip, str) else skip or ()), *foreign_skip]
        recipe = build_recipe(low_bit, names, cpu_embedding, choices)
        if mixed and recipe.head is not None:
            recipe = build_recipe(None, None, False, Choices(recipe=recipe, head=_MIXED_HEAD))
        return cls(recipe, dtype, choices, pickles)

    def with_dtype(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        return kwargs if self.dtype is None else {"dtype": self.dtype, **kwargs}

    def job(self) -> Job:
        return Job(self.choices.kernel, self.choices.compute)

    def bar(self) -> AbstractContextManager[None]:
        """The bar that counts the weights of this load."""
        return weights_bar("packing" if self.recipe else "loading", self.choices.progress)


def _low_bit_named(kwargs: dict[str, Any]) -> tuple[str | None, list[str]]:
    """The format that load_in_4bit, load_in_low_bit or a BitsAndBytesConfig asks for, and the modules which the last leaves out."""
    low_bit = kwargs.pop("load_in_low_bit", None)
    four, eight = kwargs.pop("load_in_4bit", False), kwargs.pop("load_in_8bit", False)
    if low_bit is not None:
        return low_bit, []
    if four or eight:
        return FOUR_BITS if four else EIGHT_BITS, []
    config = kwargs.get("quantization_config")
    if isinstance(config, LowBitConfig) or not isinstance(config, transformers.BitsAndBytesConfig):
        return None, []
    kwargs.pop("quantization_config")
    skip = list(getattr(config, "llm_int8_skip_modules", None) or ["lm_head"])
    if config.load_in_8bit:
        return EIGHT_BITS, skip
    double = "_dq" if config.bnb_4bit_use_double_quant else ""
    return {"nf4": "nf4" + double, "fp4": "fp4" + double}.get(config.bnb_4bit_quant_type, FOUR_BITS), skip


class _AutoBase:
    """What the ten classes share. `transformers_class` is the class of transformers that does the work."""

    transformers_class: ClassVar[Any]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, *model_args: Any, **kwargs: Any) -> Any:
        """Load a model, packing it on the way in if a low-bit keyword asks for it."""
        request = _Request.take(kwargs)
        check_device_map(kwargs.get("device_map"))
        found = find_model(pretrained_model_name_or_path, kwargs)
        gguf = gguf_file(found.path, kwargs.pop("gguf_file", None))
        if gguf is not None:
            return cls._from_gguf(gguf, request, *model_args, **kwargs)
        name = str(pretrained_model_name_or_path if found.is_on_hub else found.path)
        folder = found.path / (kwargs.get("subfolder") or "")
        if not found.is_on_hub:
            check_folder(folder)
        check_method(folder)
        _refuse_untrusted_code(folder, name, kwargs)
        _admit_pickles(name, file_names(folder) if found.files is None else found.files, request, kwargs)
        if request.recipe is not None and _is_low_bit(folder):
            warnings.warn(
                f"{name} is low-bit already and is loaded as it is; the format asked for is ignored", stacklevel=2
            )
            request = _Request(None, request.dtype, request.choices)
        if request.recipe is not None:
            kwargs["quantization_config"] = LowBitConfig(recipe=request.recipe, job=request.job())
        wants_account = kwargs.pop("output_loading_info", False)
        with one_sentence(name, not found.is_on_hub), request.bar():
            model, account = cls.transformers_class.from_pretrained(
                name, *model_args, output_loading_info=True, **request.with_dtype(kwargs)
            )
        check_account(name, model, account, kwargs)
        model.save_low_bit = partial(save_low_bit, model)
        if found.is_on_hub:
            model.lowbit_home = found.path
        return (model, account) if wants_account else model

    @classmethod
    def load_low_bit(cls, pretrained_model_name_or_path: str | Path, *model_args: Any, **kwargs: Any) -> Any:
        """Load a folder that `save_low_bit` wrote."""
        folder = Path(pretrained_model_name_or_path).expanduser()
        check_folder(folder)
        if quantization_fields(folder) is None:
            raise CheckpointError(
                f"{folder} is a model in full precision; load it with from_pretrained(..., load_in_4bit=True)"
            )
        for name in ("optimize_model", "cpu_embedding", "disk_embedding", "embedding_qtype", "modules_to_not_convert"):
            if kwargs.pop(name, None) and name != "optimize_model":
                warnings.warn(f"{name!r} changes nothing: {folder} says itself how each weight is stored", stacklevel=2)
        return cls.from_pretrained(folder, *model_args, **kwargs)

    @classmethod
    def from_config(cls, config: Any, **kwargs: Any) -> Any:
        """A model with random weights, in full precision."""
        return cls.transformers_class.from_config(config, **kwargs)

    @classmethod
    def _from_gguf(cls, path: Path, request: _Request, *model_args: Any, **kwargs: Any) -> Any:
        """A GGUF file as a source: its tensors are unpacked one at a time as the loader asks for them."""
        gguf = open_gguf(path)
        wanted = kwargs.pop("dtype", None) or request.dtype
        dtype = torch.bfloat16 if wanted in (None, "auto") else as_dtype(wanted)
        for name in ("trust_remote_code", "low_cpu_mem_usage"):
            kwargs.pop(name, None)
        config = transformers.AutoConfig.for_model(**gguf.config)
        classes = cls.transformers_class._model_mapping
        if type(config) not in classes:
            raise CheckpointError(
                f"{path} holds a {config.model_type} model, which {cls.__name__} has no class for; "
                "a GGUF file is a language model: use AutoModelForCausalLM"
            )
        model_class = classes[type(config)]
        model_class = model_class[0] if isinstance(model_class, tuple | list) else model_class
        if request.recipe is not None:
            kwargs["quantization_config"] = LowBitConfig(recipe=request.recipe, job=request.job())
        with one_sentence(str(path), True), request.bar():
            model = model_class.from_pretrained(
                None, *model_args, config=config, state_dict=lazy_tensors(gguf, dtype), dtype=dtype, **kwargs
            )
        if gguf.generation_config and model.can_generate():
            model.generation_config = transformers.GenerationConfig(**gguf.generation_config)
        model.config._name_or_path = str(path)
        model.save_low_bit = partial(save_low_bit, model)
        return model


def _is_low_bit(folder: Path) -> bool:
    fields = quantization_fields(folder) if (folder / CONFIG).exists() else None
    return fields is not None and reads(fields)


def _refuse_untrusted_code(folder: Path, name: str, kwargs: dict[str, Any]) -> None:
    """Code of the folder's own runs only where the caller trusts it; where transformers has its own, that one runs."""
    config = read_config(folder) if (folder / CONFIG).exists() else {}
    own = config.get("auto_map")
    if own and not kwargs.get("trust_remote_code") and config["model_type"] not in transformers.CONFIG_MAPPING:
        raise CheckpointError(
            f"{name} brings its own code for a model of type {config['model_type']!r} (the Python files beside it): "
            "look at it, and pass trust_remote_code=True (--trust-remote-code) if you trust it"
        )


def _admit_pickles(name: str, files: Iterable[str], request: _Request, kwargs: dict[str, Any]) -> None:
    """Pickles only where the caller trusts them, and then nothing but tensors out of them.

    Where they are not trusted transformers is told to look for safetensors alone: it would take a pickle that lies beside
    safetensors of another name.
    """
    if request.allow_pickle:
        kwargs["weights_only"] = True
        return
    refuse_pickles(name, files)
    if kwargs.get("use_safetensors") is False:
        raise CheckpointError(
            "use_safetensors=False asks for pickles: pass allow_pickle=True if you trust their source"
        )
    kwargs["use_safetensors"] = True


class AutoModel(_AutoBase):
    transformers_class = transformers.AutoModel


class AutoModelForCausalLM(_AutoBase):
    transformers_class = transformers.AutoModelForCausalLM


class AutoModelForMaskedLM(_AutoBase):
    transformers_class = transformers.AutoModelForMaskedLM


class AutoModelForMultipleChoice(_AutoBase):
    transformers_class = transformers.AutoModelForMultipleChoice


class AutoModelForNextSentencePrediction(_AutoBase):
    transformers_class = transformers.AutoModelForNextSentencePrediction


class AutoModelForQuestionAnswering(_AutoBase):
    transformers_class = transformers.AutoModelForQuestionAnswering


class AutoModelForSeq2SeqLM(_AutoBase):
    transformers_class = transformers.AutoModelForSeq2SeqLM


class AutoModelForSequenceClassification(_AutoBase):
    transformers_class = transformers.AutoModelForSequenceClassification


class AutoModelForSpeechSeq2Seq(_AutoBase):
    transformers_class = transformers.AutoModelForSpeechSeq2Seq


class AutoModelForTokenClassification(_AutoBase):
    transformers_class = transformers.AutoModelForTokenClassification
