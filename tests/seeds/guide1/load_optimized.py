"""A model that `optimize_model` made and `save_low_bit` saved: built without its weights, then filled from the folder.

The guide has no tokenizer yet; this script goes on to a text, so that it is seen that the weights are those.
"""

import sys

import intel_extension_for_pytorch as ipex
from transformers import LlamaForCausalLM
from bigdl.llm.optimize import low_memory_init, load_low_bit

saved_dir = sys.argv[1]
with low_memory_init():  # Fast and low cost by loading model on meta device
    model = LlamaForCausalLM.from_pretrained(saved_dir, torch_dtype="auto", trust_remote_code=True)
model = load_low_bit(model, saved_dir)  # Load the optimized model

model = model.to("xpu")  # Important after obtaining the optimized model

from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(saved_dir)
input_ids = tokenizer.encode("Q: What is CPU?\nA:", return_tensors="pt").to("xpu")
output = model.generate(input_ids, max_new_tokens=32, do_sample=False).cpu()
print(repr(tokenizer.decode(output[0], skip_special_tokens=True)))
