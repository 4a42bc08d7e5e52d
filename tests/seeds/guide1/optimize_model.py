"""A model of transformers is made low-bit in one line, and moved to an Intel GPU.

It is also saved, for the next script. At the end: how many bytes it took before and takes now.
"""

# Take Llama-2-7b-chat-hf as an example
import sys

import intel_extension_for_pytorch as ipex
from transformers import LlamaForCausalLM
from bigdl.llm import optimize_model

model_path, saved_dir = sys.argv[1:]

model = LlamaForCausalLM.from_pretrained(model_path, torch_dtype="auto", low_cpu_mem_usage=True)
before = sum(p.numel() * p.element_size() for p in model.parameters())
model = optimize_model(model)  # With only one line to enable BigDL-LLM INT4 optimization
model.save_low_bit(saved_dir)

model = model.to("xpu")  # Important after obtaining the optimized model

after = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
print("device", model.device.type)
print("bytes", before, after)
