"""`optimum.intel`: models that run on OpenVINO, and the configurations of their weights. All of them are lowbit's own classes,
which have that package's names, order and defaults."""

from __future__ import annotations

import lowbit.openvino
from lowbit.compat.missing import refuse_unknown
from lowbit.compat.names import REFUSED, WORKS, Name

_COMPRESS = (
    "model.model = lowbit.openvino.compress_weights(model.model, ...), or quantization_config= of from_pretrained"
)
_ACTIVATIONS = "OVWeightQuantizationConfig: OpenVINO rounds activations itself where its plugins gain by it"
# What its classes for two systems that are gone could do, by lowbit's own names.
_TASKS = ("CausalLM", "MaskedLM", "QuestionAnswering", "Seq2SeqLM", "SequenceClassification", "TokenClassification")
_GONE = {
    f"{system}ModelFor{task}": f"lowbit.AutoModelFor{task}, which takes the place of ipex.optimize"
    for system in ("INC", "IPEX")
    for task in _TASKS
}
NEAREST = {
    "OVQuantizer": _COMPRESS,
    "OVQuantizationConfig": _ACTIVATIONS,
    "OVMixedQuantizationConfig": _ACTIVATIONS,
    "OVPipelineQuantizationConfig": "quantization_config= of each part",
    "OVTrainer": "transformers.Trainer, and the export of what it trained",
    **_GONE,
    "IPEXModel": "lowbit.AutoModel, which takes the place of ipex.optimize",
    "INCQuantizer": "lowbit.optimize_model",
    "ipex": "lowbit.AutoModelForCausalLM, which takes the place of ipex.optimize",
    "neural_compressor": "lowbit.optimize_model, or neural_compressor.transformers",
}
HOMES = {name: "lowbit.openvino" for name in lowbit.openvino.__all__ if name.startswith("OV")}

__all__ = sorted(HOMES)
__getattr__ = refuse_unknown(__name__, NEAREST, HOMES)

_PLACE = "optimum.intel"
_UNIT = "tests/unit/test_compat_optimum.py::"
_SEEDS = "tests/seeds/test_guide5.py::"
_SHOWN = f"{_UNIT}test_classes_are_ours"
_LOADS = f"{_PLACE}.OVModelForCausalLM.from_pretrained"
_OURS = "lowbit.openvino.OVModelForCausalLM.from_pretrained"
_REFUSED = f"{_UNIT}test_what_is_not_there_is_named"
NAMES = (
    *(Name(f"{_PLACE}.{name}", f"lowbit.openvino.{name}", WORKS, _SHOWN) for name in __all__),
    Name(f"{_LOADS}(export=)", _OURS, WORKS, f"{_SEEDS}test_export_and_save", "may be left out"),
    Name(
        f"{_LOADS}(device=)",
        _OURS,
        WORKS,
        f"{_SEEDS}test_export_and_save",
        "and `.to`; those that are here, or refused",
    ),
    Name(f"{_LOADS}(load_in_8bit=)", _OURS, WORKS, f"{_SEEDS}test_eight_bits", "by itself above 1e9 weights, and said"),
    Name(f"{_LOADS}(load_in_4bit=)", _OURS, WORKS, f"{_UNIT}test_keywords", "done, where that package left it undone"),
    Name(f"{_LOADS}(quantization_config=)", _OURS, WORKS, f"{_UNIT}test_keywords", "lowbit's configurations too"),
    *(Name(f"{_PLACE}.{name}", "", REFUSED, _REFUSED, f"use {instead}") for name, instead in NEAREST.items()),
)
