"""The class of the old library that is no auto class. In a file of its own: transformers imports much for it."""

from __future__ import annotations

import transformers

from lowbit.checkpoint.auto import _AutoBase
from lowbit.compat.faces.ipex_llm.transformers.model import _BaseAutoModelClass
from lowbit.compat.missing import refuse_unknown


class _Qwen2VL(_AutoBase):
    transformers_class = transformers.Qwen2VLForConditionalGeneration


class Qwen2VLForConditionalGeneration(_BaseAutoModelClass):
    HF_Model, OURS = transformers.Qwen2VLForConditionalGeneration, _Qwen2VL


__getattr__ = refuse_unknown(__name__, {})
