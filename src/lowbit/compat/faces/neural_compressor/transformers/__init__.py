"""`neural_compressor.transformers`: auto classes that take five configurations, and those configurations.

The configurations are lowbit's own (`lowbit.RtnConfig` and its sisters), which have that library's names, order and defaults;
the auto classes are lowbit's too, with what that library's took beside.
"""

from __future__ import annotations

from lowbit.compat.missing import refuse_unknown
from lowbit.compat.names import IGNORED, REFUSED, WORKS, Name

_MODELS = "lowbit.compat.faces.neural_compressor.transformers.models"
CONFIGS = ("AutoRoundConfig", "AwqConfig", "GPTQConfig", "RtnConfig", "TeqConfig")
AUTO_CLASSES = ("AutoModel", "AutoModelForCausalLM", "AutoModelForSeq2SeqLM")
VISION_CLASSES = (
    "LlavaForConditionalGeneration",
    "MllamaForConditionalGeneration",
    "Qwen2VLForConditionalGeneration",
)

__all__ = [
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoModelForSeq2SeqLM",
    "AutoRoundConfig",
    "AwqConfig",
    "GPTQConfig",
    "LlavaForConditionalGeneration",
    "MllamaForConditionalGeneration",
    "Qwen2VLForConditionalGeneration",
    "RtnConfig",
    "TeqConfig",
]
__getattr__ = refuse_unknown(
    __name__,
    {"INCModelForCausalLM": "AutoModelForCausalLM"},
    homes=dict.fromkeys(CONFIGS, "lowbit.configs.classes")
    | dict.fromkeys(AUTO_CLASSES, f"{_MODELS}.modeling_auto")
    | dict.fromkeys(VISION_CLASSES, f"{_MODELS}.modeling_vision"),
)

_PLACE = "neural_compressor.transformers"
_LOADS = f"{_PLACE}.AutoModelForCausalLM.from_pretrained"
_UNIT = "tests/unit/test_compat_neural_compressor.py::"
_GUIDE = "tests/seeds/test_guide2.py::test_five_algorithms"
_IDLE_FIELDS = {
    "use_layer_wise": "one block is in memory at a time in any case",
    "model_path": "the model is the one that is loaded",
    "GPTQConfig.batch_size": "the size of a batch changes no result",
    "GPTQConfig.use_mse_search": "scales are always searched",
    "AwqConfig.backend": "there is one way to run a model",
    "AwqConfig.absorb_layer_dict": "what can absorb a scale is found by running each block",
    "TeqConfig.folding": "scales are always folded",
    "AutoRoundConfig.export_format": "there is one form to save in",
    "AutoRoundConfig.truncation": "the text is cut into windows",
    "AutoRoundConfig.quant_nontext_module": "modules_to_not_convert names what is left out",
}
NAMES = (
    *(Name(f"{_PLACE}.{name}", f"lowbit.{name}", WORKS, _GUIDE) for name in CONFIGS),
    *(Name(f"{_PLACE}.{name}", f"lowbit.{name}", WORKS, f"{_UNIT}test_classes_load") for name in AUTO_CLASSES),
    *(Name(f"{_PLACE}.{name}", "", WORKS, f"{_UNIT}test_classes_for_pictures") for name in VISION_CLASSES),
    Name(f"{_LOADS}(quantization_config=)", "lowbit.AutoModelForCausalLM.from_pretrained", WORKS, _GUIDE),
    Name(
        f"{_LOADS}(device_map=)",
        "lowbit.AutoModelForCausalLM.from_pretrained",
        WORKS,
        "tests/seeds/test_guide2.py::test_on_a_gpu",
        "without it the XPU where there is one, as there",
    ),
    Name(
        f"{_LOADS}(a folder that it saved)",
        "lowbit.AutoModelForCausalLM.from_pretrained",
        WORKS,
        "tests/unit/test_compressor_saves.py::test_each_method_is_read_through_its_face",
        "packed as it lies there; save_pretrained writes it anew in the form that transformers reads",
    ),
    Name(f"{_LOADS}(for_inference=)", "", IGNORED, f"{_UNIT}test_keywords", "a model that was made low-bit runs"),
    Name(f"{_LOADS}(use_layer_wise=)", "", IGNORED, f"{_UNIT}test_keywords", _IDLE_FIELDS["use_layer_wise"]),
    Name(f"{_LOADS}(use_llm_runtime=)", "", IGNORED, f"{_UNIT}test_keywords", "there is one engine"),
    Name(
        f"{_PLACE}.AutoModelForCausalLM.load_low_bit",
        "lowbit.AutoModelForCausalLM.load_low_bit",
        WORKS,
        f"{_UNIT}test_classes_load",
    ),
    *(
        Name(
            f"{_PLACE}.{field if '.' in field else 'RtnConfig.' + field}",
            "",
            IGNORED,
            "tests/unit/test_configs.py::test_each_field_that_changes_nothing",
            reason,
        )
        for field, reason in _IDLE_FIELDS.items()
    ),
    Name(
        "INC_TARGET_DEVICE",
        "",
        WORKS,
        "tests/unit/test_configs.py::test_where_models_are_quantised",
        "cpu, cuda, xpu or hpu, in whatever case",
    ),
    Name(
        "run_generation_gpu_woq.py --woq --benchmark",
        "lowbit bench --woq --benchmark --model MODEL",
        WORKS,
        "tests/unit/test_cli_bench_woq.py::test_a_model_is_quantised_saved_and_timed",
    ),
    Name("neural_compressor.torch", "lowbit.optimize_model", REFUSED, f"{_UNIT}test_what_is_not_there_is_named"),
    Name(
        "neural_compressor.evaluation.lm_eval", "lowbit.perplexity", REFUSED, f"{_UNIT}test_what_is_not_there_is_named"
    ),
)
