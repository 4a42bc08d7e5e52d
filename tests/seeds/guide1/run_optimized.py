"""A model in four bits answers a question on an Intel GPU, and the answer comes back to the CPU.

The guide uses `tokenizer` without having made it: mended here, in front.
"""

import sys

import intel_extension_for_pytorch as ipex
from bigdl.llm.transformers import AutoModelForCausalLM
from transformers import AutoTokenizer

model_path = sys.argv[1]
model = AutoModelForCausalLM.from_pretrained(model_path, load_in_4bit=True)
model = model.to("xpu")
tokenizer = AutoTokenizer.from_pretrained(model_path)

import torch

with torch.inference_mode():
    prompt = "Q: What is CPU?\nA:"
    input_ids = tokenizer.encode(prompt, return_tensors="pt").to(
        "xpu"
    )  # With .to('xpu') specifically for inference on Intel GPUs
    output = model.generate(input_ids, max_new_tokens=32)
    torch.xpu.synchronize()
    output = output.cpu()  # Move to CPU
    output_str = tokenizer.decode(output[0], skip_special_tokens=True)

print(repr(output_str))
