"""`neural_compressor.transformers.quantization.utils`: quantising a model that is there already, saving, names of types."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from lowbit.calibration import calibration_from
from lowbit.compat.ignored import say_ignored
from lowbit.compat.missing import refuse_unknown
from lowbit.compat.names import REFUSED, WORKS, Name
from lowbit.configs.base import WeightOnlyConfig
from lowbit.errors import RecipeError, nearest
from lowbit.optimize import optimize_model

__getattr__ = refuse_unknown(
    __name__,
    {
        "replace_linear": "convert_to_quantized_model, which replaces every linear layer that it packs",
        "repack_awq_and_load_state_dict": "AutoModelForCausalLM.from_pretrained",
        "save_low_bit_for_inc": "save_low_bit: there is one form to save in",
    },
)
_UNIT = "tests/unit/test_compat_neural_compressor.py::test_a_model_that_is_there_already"
_PLACE = "neural_compressor.transformers.quantization.utils"
NAMES = (
    Name(f"{_PLACE}.convert_to_quantized_model", "lowbit.optimize_model", WORKS, _UNIT),
    Name(f"{_PLACE}.save_low_bit", "lowbit.save_low_bit", WORKS, _UNIT),
    Name(f"{_PLACE}.convert_dtype_str2torch", "", WORKS, _UNIT),
    Name(f"{_PLACE}.convert_dtype_torch2str", "", WORKS, _UNIT),
    Name(f"{_PLACE}.replace_linear", "lowbit.optimize_model", REFUSED, _UNIT),
)

_TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "int8": torch.int8}


def convert_dtype_str2torch(str_dtype: str) -> torch.dtype:
    """The type of torch that a name of this library stands for."""
    named = "fp32" if str_dtype == "auto" else str_dtype
    if named not in _TYPES:
        raise RecipeError(f"there is no type {str_dtype!r}: {nearest(str_dtype, _TYPES)}")
    return _TYPES[named]


def convert_dtype_torch2str(dtype: torch.dtype | str) -> str:
    """The name of this library for a type of torch."""
    names = {kind: name for name, kind in _TYPES.items()}
    if isinstance(dtype, str):
        return dtype
    if dtype not in names:
        raise RecipeError(f"{dtype} has no name here: it is one of {', '.join(map(str, names))}")
    return names[dtype]


def convert_to_quantized_model(
    model: Any, config: WeightOnlyConfig, device: str = "cpu", for_inference: bool = False
) -> Any:
    """Quantise a model of transformers that is there already, in place, and move it to where it shall run."""
    asked = config.calibration()
    calibration = None
    if asked is not None:
        tokenizer = asked.tokenizer or transformers.AutoTokenizer.from_pretrained(model.config.name_or_path)
        calibration = calibration_from(asked, tokenizer)
    optimize_model(model, low_bit=None, recipe=config.to_recipe(), compute=config.compute, calibration=calibration)
    model.quantization_config = config
    return model.to(device)


def save_low_bit(self: Any, save_directory: str | Path, push_to_hub: bool = False, **kwargs: Any) -> None:
    """What `model.save_pretrained` does."""
    for name in kwargs:
        say_ignored(f"{_PLACE}.save_low_bit", name, "the model is saved in one form")
    self.save_pretrained(save_directory, push_to_hub=push_to_hub)
