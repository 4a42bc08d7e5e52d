"""The ten auto classes: transformers' own, with the keywords of low-bit loading in front.

    AutoModelForCausalLM.from_pretrained(folder, load_in_4bit=True)
    AutoModelForCausalLM.from_pretrained(folder, load_in_low_bit="nf4", modules_to_not_convert=["lm_head"])
    AutoModelForCausalLM.from_pretrained("model.Q4_K_M.gguf", load_in_4bit=True)
    AutoModelForCausalLM.load_low_bit(folder)

Weights are packed while the checkpoint streams in, one at a time, so a model never lies in memory in full precision. Without a
low-bit keyword the call is transformers' own. A folder that is low-bit already loads as it is, whatever the keywords ask for.
Keywords that belong to transformers go on to it untouched, but for folders of other systems, which lowbit reads itself: there
those that change nothing are named in a warning.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
import transformers

from lowbit.checkpoint.calibrated import calibrate_, pages_of, tokens_for
from lowbit.checkpoint.compressor_saves import compressor_fields, load_compressor_save
from lowbit.checkpoint.devices import check_device_map, one_place, quantizing_device
from lowbit.checkpoint.folder import check_folder, quantization_fields, refuse_pickles
from lowbit.checkpoint.foreign import MODEL_WORDS
from lowbit.checkpoint.gguf_source import gguf_file, gguf_tokenizer, lazy_tensors
from lowbit.checkpoint.hf import Job, LowBitConfig, reads
from lowbit.checkpoint.hub import fetch_weights, find_model
from lowbit.checkpoint.keywords import as_dtype
from lowbit.checkpoint.layout import held_weights
from lowbit.checkpoint.loading_bar import weights_bar
from lowbit.checkpoint.old_saves import load_old_save, old_low_bit
from lowbit.checkpoint.packed_saves import load_packed_save, packed_fields
from lowbit.checkpoint.pages import Pages
from lowbit.checkpoint.request import Request
from lowbit.checkpoint.save import save_low_bit
from lowbit.checkpoint.verdict import check_account, check_method, one_sentence
from lowbit.configs.base import WeightOnlyConfig
from lowbit.configs.classes import config_from, saved_config
from lowbit.contents import CONFIG, file_names, read_config
from lowbit.errors import CheckpointError
from lowbit.interop.gguf import open_gguf
from lowbit.layers import prepare_

# transformers' keywords that finding a folder takes, or that say nothing of how the model is, where lowbit reads it itself.
_FOLDER_WORDS = (
    "dtype", "device_map", "revision", "cache_dir", "token", "local_files_only", "subfolder", "low_cpu_mem_usage",
    "use_safetensors",
)  # fmt: skip


class _AutoBase:
    """What the ten classes share. `transformers_class` is the class of transformers that does the work."""

    transformers_class: ClassVar[Any]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, *model_args: Any, **kwargs: Any) -> Any:
        """Load a model, packing it on the way in if a low-bit keyword asks for it."""
        request = Request.take(kwargs)
        check_device_map(kwargs.get("device_map"))
        found = find_model(pretrained_model_name_or_path, kwargs)
        gguf = gguf_file(found.path, kwargs.pop("gguf_file", None))
        if gguf is not None:
            return cls._from_gguf(gguf, request, *model_args, **kwargs)
        name = str(pretrained_model_name_or_path if found.is_on_hub else found.path)
        folder = found.path / (kwargs.get("subfolder") or "")
        if old_low_bit(folder) is not None:
            return _from_old_save(cls.transformers_class, folder, request, kwargs)
        if compressor_fields(folder) is not None:
            return _from_compressor(cls.transformers_class, folder, request, kwargs)
        packed = packed_fields(folder)
        if packed is not None:
            if found.files is not None:
                fetch_weights(name, found.files, kwargs)
            model = _from_packed(cls.transformers_class, folder, packed, request, kwargs)
            if found.is_on_hub:
                model.config._name_or_path, model.lowbit_home = name, found.path
            return model
        if not found.is_on_hub:
            check_folder(folder)
        check_method(folder)
        _refuse_untrusted_code(folder, name, kwargs)
        _admit_pickles(name, file_names(folder) if found.files is None else found.files, request, kwargs)
        if request.idle_on_low_bit and _is_low_bit(folder):
            warnings.warn(f"{name} is low-bit already and is loaded as it is; {request.idle_on_low_bit}", stacklevel=2)
            request = Request(None, request.dtype, request.choices)
        place = _move_to_quantize(request, kwargs)
        calibration = tokens_for(request, partial(_tokenizer, name, kwargs))
        if request.recipe is not None and calibration is None:
            kwargs["quantization_config"] = LowBitConfig(recipe=request.recipe, job=_job(request))
        pages = pages_of(found, folder)
        wants_account = kwargs.pop("output_loading_info", False)
        with one_sentence(name, not found.is_on_hub), _bar(request):
            model, account = cls.transformers_class.from_pretrained(
                name, *model_args, output_loading_info=True, **request.with_dtype(kwargs)
            )
        check_account(name, model, account, kwargs)
        if calibration is not None:
            calibrate_(model, request, calibration, pages)
        model.save_low_bit = partial(save_low_bit, model)
        if found.is_on_hub:
            model.lowbit_home = found.path
        _run_as_asked_(model, request)
        _settle(model, place, request.config or (None if found.is_on_hub else saved_config(folder)))
        return (model, account) if wants_account else model

    @classmethod
    def load_low_bit(cls, pretrained_model_name_or_path: str | Path, *model_args: Any, **kwargs: Any) -> Any:
        """Load a folder that `save_low_bit` wrote, here or, with `allow_pickle`, in BigDL-LLM or ipex-llm."""
        folder = Path(pretrained_model_name_or_path).expanduser()
        old = old_low_bit(folder)
        if old is None:
            check_folder(folder)
        if old is None and quantization_fields(folder) is None:
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
    def _from_gguf(cls, path: Path, request: Request, *model_args: Any, **kwargs: Any) -> Any:
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
        place = _move_to_quantize(request, kwargs)
        calibration = tokens_for(request, partial(gguf_tokenizer, path))
        if request.recipe is not None and calibration is None:
            kwargs["quantization_config"] = LowBitConfig(recipe=request.recipe, job=_job(request))
        with one_sentence(str(path), True), _bar(request):
            model = model_class.from_pretrained(
                None, *model_args, config=config, state_dict=lazy_tensors(gguf, dtype), dtype=dtype, **kwargs
            )
        if gguf.generation_config and model.can_generate():
            model.generation_config = transformers.GenerationConfig(**gguf.generation_config)
        if calibration is not None:
            calibrate_(model, request, calibration, Pages(()))
        model.config._name_or_path = str(path)
        model.save_low_bit = partial(save_low_bit, model)
        _run_as_asked_(model, request)
        _settle(model, place, request.config)
        return model


def _from_old_save(auto_class: Any, folder: Path, request: Request, kwargs: dict[str, Any]) -> Any:
    """A folder that the old systems saved: it says itself how each weight is stored, and other keywords have no say."""
    return _loaded_as_it_is(partial(load_old_save, auto_class, folder, request.allow_pickle), folder, request, kwargs)


def _from_compressor(auto_class: Any, folder: Path, request: Request, kwargs: dict[str, Any]) -> Any:
    """A folder that Neural Compressor saved, likewise; what its products are computed in, it says too."""
    config = config_from(compressor_fields(folder) or {})
    # "fp32" is what that system wrote where nobody had said anything.
    if config is not None and config.compute != "fp32" and request.choices.compute == Job.compute:
        request = replace(request, choices=replace(request.choices, compute=config.compute))
    return _loaded_as_it_is(partial(load_compressor_save, auto_class, folder), folder, request, kwargs, config)


def _from_packed(
    auto_class: Any, folder: Path, fields: Mapping[str, Any], request: Request, kwargs: dict[str, Any]
) -> Any:
    """A folder of GPTQ, AWQ or AutoRound; one that has the integers that are asked for is what was asked for."""
    bits, asked = fields.get("bits", fields.get("w_bit")), request.recipe
    looks_at_data = request.imatrix is not None or (request.config is None and request.choices.calibration is not None)
    if asked is not None and (asked.linear.kind, asked.linear.bits) == ("int", bits) and not looks_at_data:
        request = replace(request, recipe=None, config=None)
    return _loaded_as_it_is(
        partial(load_packed_save, auto_class, folder, request.allow_pickle), folder, request, kwargs
    )


def _loaded_as_it_is(
    load: Callable[..., Any],
    folder: Path,
    request: Request,
    kwargs: dict[str, Any],
    config: WeightOnlyConfig | None = None,
) -> Any:
    """A folder of another system, with everything of the call that can be done to it; the rest is named in a warning."""
    place = one_place(kwargs.get("device_map"))
    if request.idle_on_low_bit:
        warnings.warn(f"{folder} is low-bit already and is loaded as it is; {request.idle_on_low_bit}", stacklevel=4)
    given = {name: value for name, value in kwargs.items() if value is not None and value is not False}
    idle = sorted(given.keys() - {*_FOLDER_WORDS, *MODEL_WORDS})
    if idle:
        warnings.warn(f"{folder} is read by lowbit itself, where these change nothing: {', '.join(idle)}", stacklevel=4)
    known = {name: kwargs[name] for name in MODEL_WORDS if kwargs.get(name) is not None}
    model = load(kwargs.get("dtype") or request.dtype, **known)
    _run_as_asked_(model, replace(request, recipe=None))
    _settle(model, place, config)
    return model


def _job(request: Request) -> Job:
    return Job(request.choices.kernel, request.choices.compute, request.imatrix)


def _move_to_quantize(request: Request, kwargs: dict[str, Any]) -> Any:
    """Load onto the device on which a configuration has models quantised; the place to go to afterwards, or None."""
    place = kwargs.get("device_map")
    elsewhere = quantizing_device(request.config, place)
    if elsewhere is None:
        return None
    kwargs["device_map"] = elsewhere
    return "cpu" if place is None else place


def _run_as_asked_(model: Any, request: Request) -> None:
    """Let weights that a folder brought packed be multiplied as `compute` and `kernel` say; where it packs them, packing does."""
    job = _job(request)
    if request.recipe is not None or (job.compute, job.kernel) == (Job.compute, Job.kernel):
        return
    held = held_weights(model)
    if not held:
        warnings.warn(
            "compute= and kernel= say how packed weights are multiplied, and this model has none", stacklevel=3
        )
        return
    for one in held:
        one.weight.compute = job.compute
    prepare_(model, job.kernel)
    model.hf_quantizer.quantization_config.job = job


def _settle(model: Any, place: Any, config: WeightOnlyConfig | None) -> None:
    """Bring a model to where it runs, and leave the configuration on it that it was made with."""
    if place is not None:
        model.to(place)
    if config is not None:
        model.quantization_config = config


def _tokenizer(name: str, kwargs: dict[str, Any]) -> Any:
    """The tokenizer beside a model, found by the keywords that found the model."""
    known = ("revision", "cache_dir", "token", "local_files_only", "subfolder", "trust_remote_code")
    which = {key: kwargs[key] for key in known if kwargs.get(key) is not None}
    with one_sentence(f"the tokenizer of {name}"):
        return transformers.AutoTokenizer.from_pretrained(name, **which)


def _bar(request: Request) -> AbstractContextManager[None]:
    """The bar that counts the weights of this load."""
    packs = request.recipe is not None and request.choices.calibration is None
    return weights_bar("packing" if packs else "loading", request.choices.progress)


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


def _admit_pickles(name: str, files: Iterable[str], request: Request, kwargs: dict[str, Any]) -> None:
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
