"""OpenVINO: models as its intermediate representation (IR), with the codes that lowbit holds, and run by its package.

The public names are imported when first used: importing this room costs nothing and does not need the package yet.
"""

from __future__ import annotations

import importlib
from typing import Any

# Where each public name lives; one line for each module.
_HOMES: dict[str, tuple[str, ...]] = {
    "causal_lm": ("OVModelForCausalLM",),
    "compress": ("compress_weights", "compression_report"),
    "configs": ("OVConfig", "OVQuantizationMethod", "OVWeightQuantizationConfig"),
    "diffusion": (
        "OVDiffusionPipeline",
        "OVFluxImg2ImgPipeline",
        "OVFluxInpaintPipeline",
        "OVFluxPipeline",
        "OVLatentConsistencyModelPipeline",
        "OVPipelineForImage2Image",
        "OVPipelineForInpainting",
        "OVPipelineForText2Image",
        "OVStableDiffusion3Img2ImgPipeline",
        "OVStableDiffusion3Pipeline",
        "OVStableDiffusionImg2ImgPipeline",
        "OVStableDiffusionInpaintPipeline",
        "OVStableDiffusionPipeline",
        "OVStableDiffusionXLImg2ImgPipeline",
        "OVStableDiffusionXLInpaintPipeline",
        "OVStableDiffusionXLPipeline",
    ),
    "export": ("Written", "write_decoder"),
    "library": ("devices",),
    "modes": (
        "AdvancedCompressionParameters",
        "BackupMode",
        "CompressWeightsMode",
        "Dataset",
        "GPTQParams",
        "GroupSizeFallbackMode",
        "IgnoredScope",
        "SensitivityMetric",
    ),
    "seq2seq": ("OVModelForSeq2SeqLM", "OVModelForSpeechSeq2Seq"),
    "traced": (
        "OVModelForAudioClassification",
        "OVModelForCTC",
        "OVModelForFeatureExtraction",
        "OVModelForImageClassification",
        "OVModelForMaskedLM",
        "OVModelForQuestionAnswering",
        "OVModelForSequenceClassification",
        "OVModelForTokenClassification",
    ),
    "tracing": ("Traced", "trace"),
    "comparison": ("Verification", "verify"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME_OF)


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'lowbit.openvino' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"lowbit.openvino.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
