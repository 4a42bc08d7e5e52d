"""A model is loaded for QLoRA: linears in nf4, the head left alone, the rest in float16, on an Intel GPU.

The guide names torch.float16 without importing torch: mended here. At the end: which classes its linears have, how one of them
is stored, and what the head is.
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

print(sorted({type(module).__name__ for name, module in model.named_modules() if name.endswith(("q_proj", "lm_head"))}))
print(model.model.layers[0].self_attn.q_proj.packed_weight.format, model.lm_head.weight.dtype, model.device.type)
