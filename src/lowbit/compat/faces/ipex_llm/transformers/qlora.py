"""`ipex_llm.transformers.qlora`: adapters on a low-bit model are peft's own, because its layers are linears to peft.

    model = prepare_model_for_kbit_training(model)
    model = get_peft_model(model, LoraConfig(r=8, target_modules=["q_proj", "v_proj"]))

The packed weights stay as they are and the gradient goes through them; only the adapters learn, and what is saved is an ordinary
peft folder.
"""

from __future__ import annotations

from typing import Any

import peft
import torch
import transformers
from peft.tuners.lora import LoraLayer

from lowbit.compat.missing import refuse_unknown
from lowbit.compat.names import REFUSED, WORKS, Name
from lowbit.errors import RecipeError
from lowbit.layers import packed_weights

# Taken when this module is imported: `llm_patch` puts others in the place of peft's.
_get_peft_model, _prepare = peft.get_peft_model, peft.prepare_model_for_kbit_training
_PeftLoraConfig, _TrainingArguments = peft.LoraConfig, transformers.TrainingArguments
PeftModel = peft.PeftModel
_MODES = ("qlora", "lora", "relora")


class LoraConfig(_PeftLoraConfig):  # type: ignore[misc,valid-type]
    """peft's, with the old library's `training_mode`. What is saved of it is peft's alone."""

    def __init__(self, *args: Any, training_mode: str = "qlora", **kwargs: Any) -> None:
        if training_mode not in _MODES:
            raise RecipeError(
                f"training_mode={training_mode!r} is not there: use one of {', '.join(_MODES)}; "
                "qalora's adapters change zero points, which packed weights here keep"
            )
        super().__init__(*args, **kwargs)
        self.training_mode = training_mode


class TrainingArguments(_TrainingArguments):  # type: ignore[misc,valid-type]
    """transformers', in bf16 as the old library set it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs | {"fp16": False, "bf16": True})


def prepare_model_for_kbit_training(model: Any, use_gradient_checkpointing: bool = True, **kwargs: Any) -> Any:
    """Freeze the model, bring its norms to fp32, and let gradients enter at the embedding.

    Products are made without rounding activations from here on: what is learnt belongs to the weights as they are, and an adapter
    that is merged into them gives the same logits.
    """
    for weight in packed_weights(model).values():
        weight.compute = "fp32"
        if weight.kernel is not None:
            weight.prepare_()
    return _prepare(model, use_gradient_checkpointing=use_gradient_checkpointing, **kwargs)


def get_peft_model(model: Any, peft_config: Any, *args: Any, **kwargs: Any) -> Any:
    """Put adapters on a low-bit model."""
    return _get_peft_model(model, peft_config, *args, **kwargs)


def cast_lora_weight(model: torch.nn.Module, dtype: torch.dtype = torch.bfloat16) -> None:
    """Let the adapters of a model compute in another type; norms go back to fp32."""
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            for adapters in (module.lora_A, module.lora_B):
                adapters.to(dtype)
        if "norm" in name:
            module.to(torch.float32)


__getattr__ = refuse_unknown(
    __name__,
    {
        "LoraLowBitLinear": "peft.tuners.lora.Linear, which holds the low-bit layer as its base_layer",
        "LoraBF16Linear": "peft.tuners.lora.Linear, which holds the layer as its base_layer",
    },
)

_TEST = "tests/unit/test_compat_qlora.py::test_the_guides_finetuning"
_CONFIG = "tests/unit/test_compat_qlora.py::test_old_lora_config_saves_as_pefts"
_PLACE = "ipex_llm.transformers.qlora"
NAMES = (
    Name(f"{_PLACE}.prepare_model_for_kbit_training", "", WORKS, _TEST, "peft's own works as well"),
    Name(f"{_PLACE}.get_peft_model", "", WORKS, _TEST, "peft's own works as well"),
    Name(f"{_PLACE}.PeftModel", "", WORKS, _CONFIG, "it is peft's"),
    Name(f"{_PLACE}.LoraConfig", "", WORKS, _CONFIG, "peft's, with training_mode"),
    Name(f"{_PLACE}.LoraConfig(training_mode=)", "", WORKS, _CONFIG, "qlora, lora and relora; qalora is refused"),
    Name(f"{_PLACE}.TrainingArguments", "", WORKS, "tests/unit/test_compat_bigdl.py::test_llm_patch_and_unpatch"),
    Name(f"{_PLACE}.cast_lora_weight", "", WORKS, _CONFIG),
    *(
        Name(
            f"{_PLACE}.{name}",
            "",
            REFUSED,
            "tests/unit/test_compat_bigdl_names.py::test_what_is_not_there_says_what_to_use",
            "use peft.tuners.lora.Linear, which holds the low-bit layer as its base_layer",
        )
        for name in ("LoraLowBitLinear", "LoraBF16Linear")
    ),
)
