"""`ipex_llm.transformers.AutoModel*`: lowbit's auto classes behind the old class methods and keywords."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
import transformers

import lowbit
from lowbit.checkpoint.gguf_source import gguf_tokenizer
from lowbit.checkpoint.request import bitsandbytes_config
from lowbit.compat.faces.ipex_llm.llm_patching import training
from lowbit.compat.faces.ipex_llm.old_model import (
    LOW_BIT_KEY,
    adopt,
    clear_benchmarks,
    lookup_generate,
    offer_methods,
    save_low_bit,
    say_ignored_in,
    speculative_generate,
)
from lowbit.compat.faces.ipex_llm.optimize import KERNELS
from lowbit.compat.faces.ipex_llm.transformers.pipeline_parallel import check_stages, pipeline_parallel_generate
from lowbit.compat.ignored import say_ignored
from lowbit.compat.missing import refuse_unknown
from lowbit.compat.names import IGNORED, WORKS, Name
from lowbit.contents import CONFIG, read_config
from lowbit.formats import CASTS, IQ_TYPES
from lowbit.layers import packed_weights

_DRAFT, _WITH_ZEROS = "sym_int4", "asym_int4"
# What the old library gave the embedding of a model where nothing was said.
EMBEDDINGS = dict.fromkeys(("q2_k", *IQ_TYPES), "q2_k") | {"gguf_q4k_s": "q4_k", "gguf_q4k_m": "q4_k"}
IDLE = {
    "disk_embedding": "weights stay mapped from their files until they are used",
    "lightweight_bmm": "attention is left to the model",
    "disable_optimize_pre": "there is no separate first pass to leave out",
    "offload_folder": "weights stay mapped from their files until they are used",
    "offload_state_dict": "weights stay mapped from their files until they are used",
}
_IDLE_SAVED = {"variant": "a saved folder holds one form of its weights"}


class _BaseAutoModelClass:
    """What the classes share: `OURS` does the work, `HF_Model` is transformers' class of that name."""

    HF_Model: ClassVar[Any] = None
    OURS: ClassVar[Any] = None
    # What every model has as methods of its own.
    save_low_bit = staticmethod(save_low_bit)
    lookup_generate = staticmethod(lookup_generate)
    speculative_generate = staticmethod(speculative_generate)
    clear_benchmarks = staticmethod(clear_benchmarks)
    pipeline_parallel_generate = staticmethod(pipeline_parallel_generate)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load a model, made low-bit on the way where `load_in_4bit`, `load_in_low_bit` or a BitsAndBytesConfig asks for it."""
        args, kwargs = _named(args, kwargs)
        _check_old(kwargs)
        train = training()
        if train:
            _prepare_training(kwargs)
        low_bit = _low_bit(kwargs)
        config = bitsandbytes_config(kwargs.get("quantization_config"))
        if config is not None and config.load_in_4bit:
            kwargs.setdefault("torch_dtype", config.bnb_4bit_compute_dtype)  # what is not packed had that type
        embedding = EMBEDDINGS.get(low_bit or "")
        if embedding is not None and not kwargs.get("cpu_embedding"):
            kwargs.setdefault("embedding_qtype", embedding)
        speculative = kwargs.pop("speculative", False)
        model = cls.OURS.from_pretrained(*args, **kwargs)
        low_bit = _as_it_lies(model, low_bit)
        if low_bit is None and not speculative:
            return offer_methods(model)
        draft = None
        if speculative:
            for name in ("load_in_4bit", "embedding_qtype", "mixed_precision"):
                kwargs.pop(name, None)
            draft = cls.OURS.from_pretrained(*args, **kwargs | {"load_in_low_bit": _DRAFT})
        return adopt(model, low_bit, draft)

    @classmethod
    def load_convert(cls, q_k: str, optimize_model: bool, *args: Any, **kwargs: Any) -> Any:
        """`from_pretrained` with the format in front."""
        return cls.from_pretrained(*args, load_in_low_bit=q_k, optimize_model=optimize_model, **kwargs)

    @classmethod
    def load_low_bit(cls, pretrained_model_name_or_path: str | Path, *model_args: Any, **kwargs: Any) -> Any:
        """Load a folder that `save_low_bit` wrote; one that the old library wrote needs `allow_pickle=True`."""
        _check_old(kwargs)
        kwargs.pop("speculative", None)
        say_ignored_in("load_low_bit", kwargs, _IDLE_SAVED)
        folder = Path(pretrained_model_name_or_path).expanduser() / (kwargs.pop("subfolder", None) or "")
        fields = read_config(folder) if (folder / CONFIG).is_file() else {}
        name = fields.get(LOW_BIT_KEY)
        if name in CASTS and "quantization_config" not in fields and any(folder.glob("*.safetensors")):
            kwargs.setdefault("torch_dtype", CASTS[name])
            model = cls.OURS.from_pretrained(folder, *model_args, **kwargs)
        else:
            model = cls.OURS.load_low_bit(folder, *model_args, **kwargs)
        return adopt(model, name)

    @classmethod
    def from_config(cls, config: Any, **kwargs: Any) -> Any:
        """A model with random weights, in full precision."""
        return cls.OURS.from_config(config, **kwargs)

    @classmethod
    def from_gguf(
        cls, fpath: str | Path, optimize_model: bool = True, cpu_embedding: bool = False, low_bit: str = "sym_int4"
    ) -> tuple[Any, Any]:
        """A GGUF file as a model made low-bit, and its tokenizer."""
        if not optimize_model:
            say_ignored("from_gguf", "optimize_model", KERNELS)
        model = cls.OURS.from_pretrained(fpath, load_in_low_bit=low_bit, cpu_embedding=cpu_embedding)
        return adopt(model, low_bit), gguf_tokenizer(Path(fpath).expanduser())


def _named(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The model's name in front, wherever the call has it."""
    name = kwargs.pop("pretrained_model_name_or_path", None)
    return (args if name is None else (name, *args)), kwargs


def _check_old(kwargs: dict[str, Any]) -> None:
    """Take out keywords that mean nothing today, and refuse those that ask for what is not there."""
    owner = "from_pretrained"
    if kwargs.pop("replace_embedding", False):
        kwargs["cpu_embedding"] = True
    hub = kwargs.pop("model_hub", "huggingface")
    if hub != "huggingface":
        say_ignored_in(owner, {"model_hub": hub}, {"model_hub": "fetch the model first and pass its folder"})
    if check_stages(kwargs.pop("pipeline_parallel_stages", 1)) and torch.xpu.is_available():
        kwargs.setdefault("device_map", "xpu")
    if kwargs.pop("optimize_model", True) is False:
        say_ignored(owner, "optimize_model", KERNELS)
    say_ignored_in(owner, kwargs, IDLE)


def _low_bit(kwargs: Mapping[str, Any]) -> str | None:
    """The old name of the format that a call asks for."""
    if kwargs.get("load_in_low_bit") is not None:
        return str(kwargs["load_in_low_bit"])
    if kwargs.get("load_in_4bit"):
        return _DRAFT
    if kwargs.get("load_in_8bit"):
        return "sym_int8"
    config = bitsandbytes_config(kwargs.get("quantization_config"))
    if config is None or not (config.load_in_4bit or config.load_in_8bit):
        return None
    kind = "sym_int8" if config.load_in_8bit else str(config.bnb_4bit_quant_type)
    return {"int4": _DRAFT}.get(kind, kind)


def _as_it_lies(model: Any, low_bit: str | None) -> str | None:
    """The old name of what was loaded: 4 bits of a folder that GPTQ or AWQ packed have zero points, whatever was asked for."""
    kinds = {weight.format.symmetric for weight in packed_weights(model).values()} if low_bit == _DRAFT else set()
    return _WITH_ZEROS if kinds == {False} else low_bit


def _prepare_training(kwargs: dict[str, Any]) -> None:
    """What `llm_patch(train=True)` asks of every load: the head left alone, and bf16 where nothing else is said."""
    if _low_bit(kwargs) is None:
        kwargs["load_in_low_bit"] = "bf16"
    if kwargs.get("load_in_low_bit") not in CASTS:
        kwargs.setdefault("modules_to_not_convert", ["lm_head"])


class AutoModel(_BaseAutoModelClass):
    HF_Model, OURS = transformers.AutoModel, lowbit.AutoModel


class AutoModelForCausalLM(_BaseAutoModelClass):
    HF_Model, OURS = transformers.AutoModelForCausalLM, lowbit.AutoModelForCausalLM


class AutoModelForMaskedLM(_BaseAutoModelClass):
    HF_Model, OURS = transformers.AutoModelForMaskedLM, lowbit.AutoModelForMaskedLM


class AutoModelForMultipleChoice(_BaseAutoModelClass):
    HF_Model, OURS = transformers.AutoModelForMultipleChoice, lowbit.AutoModelForMultipleChoice


class AutoModelForNextSentencePrediction(_BaseAutoModelClass):
    HF_Model, OURS = transformers.AutoModelForNextSentencePrediction, lowbit.AutoModelForNextSentencePrediction


class AutoModelForQuestionAnswering(_BaseAutoModelClass):
    HF_Model, OURS = transformers.AutoModelForQuestionAnswering, lowbit.AutoModelForQuestionAnswering


class AutoModelForSeq2SeqLM(_BaseAutoModelClass):
    HF_Model, OURS = transformers.AutoModelForSeq2SeqLM, lowbit.AutoModelForSeq2SeqLM


class AutoModelForSequenceClassification(_BaseAutoModelClass):
    HF_Model, OURS = transformers.AutoModelForSequenceClassification, lowbit.AutoModelForSequenceClassification


class AutoModelForSpeechSeq2Seq(_BaseAutoModelClass):
    HF_Model, OURS = transformers.AutoModelForSpeechSeq2Seq, lowbit.AutoModelForSpeechSeq2Seq


class AutoModelForTokenClassification(_BaseAutoModelClass):
    HF_Model, OURS = transformers.AutoModelForTokenClassification, lowbit.AutoModelForTokenClassification


__getattr__ = refuse_unknown(
    __name__,
    {"save_low_bit": "model.save_low_bit, or lowbit.save_low_bit"},
    {"Qwen2VLForConditionalGeneration": "lowbit.compat.faces.ipex_llm.transformers.vision"},
)

_UNIT = "tests/unit/test_compat_bigdl.py::"
_GUESSES = "tests/unit/test_compat_guesses.py::"
_ONE_BY_ONE = "tests/unit/test_compat_bigdl_names.py::"
_CLASS = "ipex_llm.transformers.AutoModelForCausalLM"
_LOADS = f"{_CLASS}.from_pretrained"
_OURS = "lowbit.AutoModelForCausalLM"
_DENSE = "the embedding stays dense, unless the head shares its weight"
_SAVED = f"{_ONE_BY_ONE}test_keywords_of_load_low_bit"
_IDLE_BOTH = ("disk_embedding", "offload_folder", "offload_state_dict")
_TOO_LATE = {"optimize_model": KERNELS} | dict.fromkeys(
    ("cpu_embedding", "embedding_qtype", "modules_to_not_convert"), "the folder says itself how each weight is stored"
)
_GGUF = f"{_ONE_BY_ONE}test_from_gguf_gives_model_and_tokenizer"
_PACKED = f"{_UNIT}test_keywords_that_change_what_is_packed"
_TESTS = {
    "load_in_4bit": f"{_UNIT}test_load_in_4bit_and_load_in_low_bit",
    "load_in_low_bit": f"{_UNIT}test_load_in_4bit_and_load_in_low_bit",
    "modules_to_not_convert": f"{_UNIT}test_load_in_4bit_and_load_in_low_bit",
    "cpu_embedding": _PACKED,
    "embedding_qtype": _PACKED,
    "mixed_precision": _PACKED,
    "quantization_config": _PACKED,
    "imatrix": f"{_UNIT}test_an_importance_matrix_weighs_inputs",
    "torch_dtype": f"{_ONE_BY_ONE}test_torch_dtype",
}
NAMES = (
    *(
        Name(
            f"{_LOADS}({keyword}=)",
            f"{_OURS}.from_pretrained",
            WORKS,
            test,
            _DENSE if keyword == "cpu_embedding" else "",
        )
        for keyword, test in _TESTS.items()
    ),
    Name(
        f"{_LOADS}(speculative=)",
        f"{_OURS}.from_pretrained",
        WORKS,
        f"{_GUESSES}test_speculative_generate_is_the_same_text",
        "an int4 copy guesses; in lowbit, generate(assistant_model=)",
    ),
    Name(
        f"{_LOADS}(optimize_model=)", "", IGNORED, f"{_ONE_BY_ONE}test_keywords_without_meaning_are_said_once", KERNELS
    ),
    *(
        Name(f"{_LOADS}({name}=)", "", IGNORED, f"{_ONE_BY_ONE}test_keywords_without_meaning_are_said_once", reason)
        for name, reason in IDLE.items()
    ),
    Name(
        f"{_LOADS}(model_hub=)",
        "",
        IGNORED,
        f"{_ONE_BY_ONE}test_keywords_without_meaning_are_said_once",
        "fetch the model first and pass its folder",
    ),
    Name(
        f"{_LOADS}(a folder of GPTQ, AWQ or AutoRound)",
        f"{_OURS}.from_pretrained",
        WORKS,
        "tests/unit/test_packed_saves.py::test_a_folder_is_loaded_as_it_lies",
        "packed as it lies there: 4 bits with zero points are asym_int4",
    ),
    Name(
        f"{_CLASS}.load_convert",
        f"{_OURS}.from_pretrained",
        WORKS,
        f"{_UNIT}test_load_convert_puts_the_format_in_front",
    ),
    Name(
        f"{_CLASS}.load_low_bit",
        f"{_OURS}.load_low_bit",
        WORKS,
        "tests/unit/test_old_saves.py::test_an_old_folder_answers_as_its_numbers_do",
        "a folder that the old library saved needs allow_pickle=True",
    ),
    Name(
        f"{_CLASS}.save_low_bit",
        "lowbit.save_low_bit",
        WORKS,
        f"{_UNIT}test_load_in_4bit_and_load_in_low_bit",
        "safetensors, which transformers reads too",
    ),
    Name(
        f"{_CLASS}.lookup_generate",
        "",
        WORKS,
        f"{_GUESSES}test_lookup_generate_is_the_same_text",
        "in lowbit, generate(prompt_lookup_num_tokens=); lookahead= of generate as well",
    ),
    Name(
        f"{_CLASS}.speculative_generate",
        "",
        WORKS,
        f"{_GUESSES}test_speculative_generate_is_the_same_text",
        "in lowbit, generate(assistant_model=)",
    ),
    Name(
        f"{_CLASS}.clear_benchmarks",
        "",
        WORKS,
        f"{_GUESSES}test_speculative_generate_is_the_same_text",
        "the figures of the last call become 0",
    ),
    *(
        Name(f"{_CLASS}.load_low_bit({name}=)", f"{_OURS}.load_low_bit", WORKS, _SAVED)
        for name in ("subfolder", "torch_dtype", "trust_remote_code")
    ),
    *(
        Name(f"{_CLASS}.load_low_bit({name}=)", "", IGNORED, _SAVED, reason)
        for name, reason in (_IDLE_SAVED | _TOO_LATE | {name: IDLE[name] for name in _IDLE_BOTH}).items()
    ),
    Name(f"{_CLASS}.from_gguf", f"{_OURS}.from_pretrained", WORKS, _GGUF),
    Name(f"{_CLASS}.from_gguf(low_bit=)", f"{_OURS}.from_pretrained", WORKS, _GGUF),
    Name(f"{_CLASS}.from_gguf(cpu_embedding=)", f"{_OURS}.from_pretrained", WORKS, _GGUF, _DENSE),
    Name(f"{_CLASS}.from_gguf(optimize_model=)", "", IGNORED, _GGUF, KERNELS),
)
