"""A model in nf4 is prepared for training: its weights stay as they are, activations are computed twice and not kept.

The guide names torch.float16 without importing torch: mended here. At the end: how many weights learn, and whether it recomputes.
"""

import sys

import torch
import intel_extension_for_pytorch as ipex
from bigdl.llm.transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(
    sys.argv[1],
    load_in_low_bit="nf4",
    optimize_model=False,
    torch_dtype=torch.float16,
    modules_to_not_convert=["lm_head"],
)
model = model.to("xpu")

from bigdl.llm.transformers.qlora import prepare_model_for_kbit_training

model.gradient_checkpointing_enable()
model = prepare_model_for_kbit_training(model)

print("learning", sum(p.numel() for p in model.parameters() if p.requires_grad))
print("checkpointing", model.is_gradient_checkpointing)
