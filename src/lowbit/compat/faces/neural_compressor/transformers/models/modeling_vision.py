"""The models that see: classes of one family each, loaded as the auto classes are. A file of their own, since they load slowly."""

from __future__ import annotations

import transformers

from lowbit.checkpoint import auto
from lowbit.compat.faces.neural_compressor.transformers.models.modeling_auto import Loading
from lowbit.compat.missing import refuse_unknown

__all__ = ["LlavaForConditionalGeneration", "MllamaForConditionalGeneration", "Qwen2VLForConditionalGeneration"]
__getattr__ = refuse_unknown(__name__, {})


class LlavaForConditionalGeneration(Loading, auto.AutoModel):
    transformers_class = transformers.LlavaForConditionalGeneration


class MllamaForConditionalGeneration(Loading, auto.AutoModel):
    transformers_class = transformers.MllamaForConditionalGeneration


class Qwen2VLForConditionalGeneration(Loading, auto.AutoModel):
    transformers_class = transformers.Qwen2VLForConditionalGeneration
