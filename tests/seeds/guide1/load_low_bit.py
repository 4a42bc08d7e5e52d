"""A model that was saved in four bits is loaded as it is, and moved to an Intel GPU. The folder is an argument.

The guide ends with the model; this script goes on to a text, so that it is seen that the weights are those.
"""

import sys

import intel_extension_for_pytorch as ipex
from bigdl.llm.transformers import AutoModelForCausalLM

saved_dir = sys.argv[1]
model = AutoModelForCausalLM.load_low_bit(saved_dir)  # Load the optimized model

model = model.to("xpu")  # Important after obtaining the optimized model
print("device", model.device.type)

from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(saved_dir)
input_ids = tokenizer.encode("Q: What is CPU?\nA:", return_tensors="pt").to("xpu")
output = model.generate(input_ids, max_new_tokens=32, do_sample=False).cpu()
print(repr(tokenizer.decode(output[0], skip_special_tokens=True)))
