"""A language model made ready by `ipex.llm.optimize` in FP32 or BF16 answers a prompt; the type is an argument.

Mended: the class was called where `from_pretrained` is meant. At the end: the type, and what it said.
"""

import sys

import torch
import intel_extension_for_pytorch as ipex
import transformers

model_name_or_path = sys.argv[1]

model = transformers.AutoModelForCausalLM.from_pretrained(model_name_or_path).eval()

dtype = getattr(torch, sys.argv[2])
model = ipex.llm.optimize(model, dtype=dtype)

# inference with model.generate()
tokenizer = transformers.AutoTokenizer.from_pretrained(model_name_or_path)
input_ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
with torch.inference_mode():
    output = model.generate(input_ids, max_new_tokens=12, do_sample=False)
print(model.dtype)
print(tokenizer.decode(output[0], skip_special_tokens=True))
