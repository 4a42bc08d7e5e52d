"""`ipex_llm.transformers`: the auto classes, and what scripts import beside them."""

from __future__ import annotations

from lowbit.compat.missing import refuse_unknown
from lowbit.compat.names import REFUSED, WORKS, Name

_AUTO = (
    "AutoModel", "AutoModelForCausalLM", "AutoModelForMaskedLM", "AutoModelForMultipleChoice",
    "AutoModelForNextSentencePrediction", "AutoModelForQuestionAnswering", "AutoModelForSeq2SeqLM",
    "AutoModelForSequenceClassification", "AutoModelForSpeechSeq2Seq", "AutoModelForTokenClassification",
)  # fmt: skip
_NATIVE = (
    "BigdlNativeForCausalLM", "BloomForCausalLM", "ChatGLMForCausalLM", "GptneoxForCausalLM", "LlamaForCausalLM",
    "StarcoderForCausalLM",
)  # fmt: skip
_NEAREST = {
    "npu_model": "ipex_llm.transformers: it runs on CPUs and GPUs, and has no kernels for an NPU",
    "PPModelWorker": "`lowbit chat`: it has no server of its own",
    "ggml_convert_low_bit": "lowbit.optimize_model",
    "relora": "ipex_llm.transformers.qlora with transformers' Trainer",
    "lisa": "ipex_llm.transformers.qlora with transformers' Trainer",
    "loader": "lowbit.AutoModelForCausalLM.from_pretrained",
    "models": "transformers' own models: lowbit changes none of their code",
    "speculative": "model.speculative_generate",
    "lookup": "model.lookup_generate",
    "kv": "model.generate: lowbit's engine keeps its own cache",
    "gguf": "AutoModelForCausalLM.from_gguf",
    "training_patch": "transformers' Trainer",
    "utils": "ipex_llm.utils, or torch itself",
}

_ELSEWHERE = {
    "Qwen2VLForConditionalGeneration": "vision",
    "convert_model_hybrid": "convert",
    "get_enable_ipex": "convert",
    "init_pipeline_parallel": "pipeline_parallel",
}

__all__ = [*_AUTO, *_NATIVE, *_ELSEWHERE]
__getattr__ = refuse_unknown(
    __name__,
    _NEAREST,
    {
        **dict.fromkeys(_AUTO, f"{__name__}.model"),
        **dict.fromkeys(_NATIVE, f"{__name__}.modelling_bigdl"),
        **{name: f"{__name__}.{home}" for name, home in _ELSEWHERE.items()},
    },
)

_UNIT = "tests/unit/test_compat_bigdl.py::"
_ONE_BY_ONE = "tests/unit/test_compat_bigdl_names.py::"
_PLACE = "ipex_llm.transformers"


def _test_of_native(name: str) -> str:
    tests = {
        "BigdlNativeForCausalLM": "llm_convert_and_the_native_classes",
        "ChatGLMForCausalLM": "the_native_class_of_chatglm",
    }
    return f"{_ONE_BY_ONE}test_{tests.get(name, 'each_native_class')}"


NAMES = (
    *(
        Name(f"{_PLACE}.{name}", f"lowbit.{name}", WORKS, f"{_ONE_BY_ONE}test_every_auto_class_is_there")
        for name in _AUTO
    ),
    Name(f"{_PLACE}.Qwen2VLForConditionalGeneration", "", WORKS, f"{_ONE_BY_ONE}test_qwen2_vl"),
    *(Name(f"{_PLACE}.{name}", "lowbit.runtime", WORKS, _test_of_native(name)) for name in _NATIVE),
    Name(f"{_PLACE}.get_enable_ipex", "", WORKS, f"{_UNIT}test_submodules_that_scripts_import", "always False"),
    *(
        Name(f"{_PLACE}.{name}", "", REFUSED, f"{_ONE_BY_ONE}test_what_is_not_there_says_what_to_use", f"use {instead}")
        for name, instead in _NEAREST.items()
    ),
)
