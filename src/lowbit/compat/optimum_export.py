"""`optimum-cli export openvino` and `optimum.exporters.openvino.main_export`: a model as a folder of OpenVINO's.

    python -m lowbit.compat optimum-cli export openvino --model ./model --weight-format int4 --group-size 64 --ratio 0.8 out

Language models are written weight after weight; what else a task names goes through its class of `lowbit.openvino`. Words about
weights mean what they mean in `OVWeightQuantizationConfig`. Above 1e9 weights a language model is written in 8 bits where nothing
is said, and one line says so.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lowbit.openvino
from lowbit.checkpoint.hub import find_model
from lowbit.contents import CONFIG, read_config
from lowbit.errors import LowbitError, nearest
from lowbit.openvino.comparison import Verification, told

# The types of weights that are not rounded, as torch names them.
DENSE = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
FORMATS = ("fp32", "fp16", "int8", "int4", "mxfp4", "nf4", "cb4")
_BITS = {"int8": 8}
# Task: the class of lowbit.openvino. `-with-past` is how every language model is written.
TASKS = {
    "text-generation": "OVModelForCausalLM",
    "text2text-generation": "OVModelForSeq2SeqLM",
    "automatic-speech-recognition": "OVModelForSpeechSeq2Seq",
    "feature-extraction": "OVModelForFeatureExtraction",
    "sentence-similarity": "OVModelForFeatureExtraction",
    "text-classification": "OVModelForSequenceClassification",
    "image-classification": "OVModelForImageClassification",
    "fill-mask": "OVModelForMaskedLM",
    "token-classification": "OVModelForTokenClassification",
    "question-answering": "OVModelForQuestionAnswering",
    "audio-classification": "OVModelForAudioClassification",
    "text-to-image": "OVDiffusionPipeline",
    "image-to-image": "OVDiffusionPipeline",
    "inpainting": "OVDiffusionPipeline",
}
# The end of a class of transformers: the task of its models.
_ENDS = {
    "ForCausalLM": "text-generation", "LMHeadModel": "text-generation", "ForSequenceClassification": "text-classification",
    "ForImageClassification": "image-classification", "ForMaskedLM": "fill-mask", "Model": "feature-extraction",
    "ForTokenClassification": "token-classification", "ForQuestionAnswering": "question-answering",
    "ForAudioClassification": "audio-classification",
    "WhisperForConditionalGeneration": "automatic-speech-recognition", "ForConditionalGeneration": "text2text-generation",
}  # fmt: skip
_PIPELINE = "model_index.json"


def main_export(
    model_name_or_path: str | Path,
    output: str | Path,
    task: str = "auto",
    device: str = "cpu",
    framework: str | None = None,
    cache_dir: str | None = None,
    trust_remote_code: bool = False,
    ov_config: Any = None,
    stateful: bool = True,
    convert_tokenizer: bool = True,
    library_name: str | None = None,
    **keywords: Any,
) -> None:
    """Export a model; `ov_config` is an OVConfig, and other keywords say whose copy of the model is meant."""
    if framework not in (None, "pt"):
        raise LowbitError(f"framework={framework!r}: lowbit reads torch's models, so leave it out")
    if not stateful:
        raise LowbitError(
            "stateful=False: a language model is written with its past inside, which generates faster; leave it out"
        )
    asked = None if ov_config is None else ov_config.quantization_config
    said = {"cache_dir": cache_dir, "trust_remote_code": trust_remote_code or None, **keywords}
    words = {name: value for name, value in said.items() if value is not None}
    dtype = None if asked is not None else getattr(ov_config, "dtype", None)
    export(model_name_or_path, output, task, asked, words, dtype=dtype, tokenizer=convert_tokenizer)


def export(
    model: str | Path,
    output: str | Path,
    task: str,
    asked: Any,
    keywords: Mapping[str, Any],
    *,
    dtype: str | None = None,
    tokenizer: bool = True,
    verify: bool = False,
) -> Verification | None:
    """Write a model of any task; `dtype` is one of DENSE, or None for the type that weights have.

    With `verify` it is compared with its source, a pipeline of pictures part by part.
    """
    name = class_of(model, task, keywords)
    if dtype is not None:
        if dtype not in DENSE:
            raise LowbitError(f"dtype={dtype!r} is the type of weights that are not rounded: {nearest(dtype, DENSE)}")
        word = "torch_dtype" if name == TASKS["text-to-image"] else "dtype"  # diffusers' word, and transformers'
        keywords = {**keywords, word: DENSE[dtype]}
    if name == TASKS["text-generation"]:
        from lowbit.openvino.exporting import export_decoder

        large = dtype is None
        return export_decoder(
            model, output, asked, large_in_8_bits=large, tokenizer=tokenizer, keywords=dict(keywords), verify=verify
        )
    if name not in lowbit.openvino.__all__:
        raise LowbitError(f"lowbit.openvino has no {name} for this task: {nearest(name, lowbit.openvino.__all__)}")
    kept: dict[str, bool] = {} if dtype is None or asked is not None else {"load_in_8bit": False}
    kept["convert_tokenizer"] = tokenizer
    made = getattr(lowbit.openvino, name).from_pretrained(
        model, export=True, quantization_config=asked, compile=False, **kept, **keywords
    )
    made.save_pretrained(output)
    if not verify:
        return None
    if name == TASKS["text-to-image"]:
        from lowbit.openvino.picture_comparison import verify_pipeline

        del made
        return verify_pipeline(output, model, keywords)
    from lowbit.openvino.class_comparison import verify_class

    kind = type(made)
    del made
    return verify_class(kind, output, model, keywords)


def class_of(model: str | Path, task: str, keywords: Mapping[str, Any]) -> str:
    """The class of a task; "auto" asks the model's own configuration."""
    task = task.removesuffix("-with-past")
    if task == "auto":
        task = _task_of(find_model(model, keywords).path)
    if task not in TASKS:
        raise LowbitError(f"the task {task!r} is none of lowbit's: {nearest(task, TASKS)}")
    return TASKS[task]


def _task_of(folder: Path) -> str:
    if (folder / _PIPELINE).is_file():
        return "text-to-image"
    if not (folder / CONFIG).is_file():
        return "text-generation"  # a .gguf file
    names = read_config(folder).get("architectures") or [""]
    found = next((task for end, task in _ENDS.items() if str(names[0]).endswith(end)), None)
    if found is None:
        raise LowbitError(
            f"{folder}: {names[0] or 'its configuration'} names no task: add --task, one of {', '.join(TASKS)}"
        )
    return found


def run(arguments: list[str]) -> int:
    """optimum-cli: of its commands the export to OpenVINO."""
    if arguments[:2] != ["export", "openvino"]:
        raise LowbitError(
            "of optimum-cli's commands lowbit answers one: optimum-cli export openvino --model MODEL OUTPUT"
        )
    asked = _parser().parse_args(arguments[2:])
    _refuse(asked)
    keywords = {
        "cache_dir": asked.cache_dir,
        "trust_remote_code": asked.trust_remote_code or None,
        "variant": asked.variant,
    }
    found = export(
        asked.model,
        asked.output,
        asked.task,
        _quantization(asked),
        {name: value for name, value in keywords.items() if value is not None},
        dtype=asked.weight_format if asked.weight_format in DENSE else None,
        tokenizer=not asked.disable_convert_tokenizer,
        verify=asked.verify,
    )
    print(f"{asked.output}: the model in OpenVINO's form")
    if found is None:
        return 0
    print("against the source:", *told(found), sep="\n  ")
    return 0 if found.passed else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="optimum-cli export openvino", description="a model in OpenVINO's form")
    parser.add_argument("output")
    parser.add_argument("-m", "--model", required=True)
    parser.add_argument("--task", default="auto")
    parser.add_argument("--framework", choices=("pt",))
    parser.add_argument("--trust-remote-code", action="store_true")
    formats = parser.add_mutually_exclusive_group()
    formats.add_argument("--weight-format", choices=FORMATS)
    for name in ("int8", "int4", "fp16"):
        formats.add_argument(f"--{name}", action="store_const", const=name, dest="weight_format")
    parser.add_argument("--quant-mode")
    parser.add_argument("--library", choices=("transformers", "diffusers", "sentence_transformers"))
    for name in ("--cache_dir", "--variant", "--backup-precision", "--dataset", "--sensitivity-metric"):
        parser.add_argument(name)
    parser.add_argument("--ratio", type=float)
    parser.add_argument("--pad-token-id", type=int)
    for name in ("--group-size", "--num-samples", "--dq-group-size"):
        parser.add_argument(name, type=int)
    for name in ("--group-size-fallback", "--quantization-statistics-path", "--smooth-quant-alpha", "--model-kwargs"):
        parser.add_argument(name)
    for name in ("--sym", "--all-layers", "--awq", "--scale-estimation", "--gptq", "--lora-correction"):
        parser.add_argument(name, action="store_true", default=None)
    parser.add_argument("--verify", action=argparse.BooleanOptionalAction, default=True, help="compare with the source")
    for name in ("--disable-stateful", "--disable-convert-tokenizer"):
        parser.add_argument(name, action="store_true")
    return parser


_WITHOUT = {
    "quant_mode": "activations are rounded by OpenVINO's plugins themselves where they gain by it: use --weight-format",
    "disable_stateful": "a language model is written with its past inside, which generates faster: leave it out",
    "smooth_quant_alpha": "no activations are rounded: use --awq, which scales them for the weights' sake",
    "quantization_statistics_path": "statistics are taken anew from --dataset: leave it out",
    "model_kwargs": "use lowbit.openvino's classes in Python, whose from_pretrained takes keywords",
    "pad_token_id": "set it in the model's config.json",
}
# What is said about weights beside their format, by the fields of OVWeightQuantizationConfig.
_FIELDS = (
    "sym", "group_size", "ratio", "dataset", "all_layers", "sensitivity_metric", "num_samples", "scale_estimation", "gptq",
    "lora_correction", "backup_precision", "group_size_fallback", "dq_group_size",
)  # fmt: skip


def _refuse(asked: argparse.Namespace) -> None:
    for name, instead in _WITHOUT.items():
        if getattr(asked, name) is not None and getattr(asked, name) is not False:  # 0 equals False
            raise LowbitError(f"--{name.replace('_', '-')}: {instead}")


def _quantization(asked: argparse.Namespace) -> Any:
    """The configuration that the words mean; None for weights in their own type."""
    words = vars(asked)
    given = {name: words[name] for name in _FIELDS if words[name] is not None}
    if asked.weight_format in (None, *DENSE):
        if given or asked.awq:
            odd = next(iter(given), "awq").replace("_", "-")
            raise LowbitError(f"--{odd} is about weights of few bits: add --weight-format int4 (or int8, nf4, mxfp4)")
        return None
    method = {"quant_method": "awq"} if asked.awq else {}
    four = asked.weight_format not in ("int8", "int4")
    return lowbit.openvino.OVWeightQuantizationConfig(
        _BITS.get(asked.weight_format, 4), dtype=asked.weight_format if four else None, **given, **method
    )
