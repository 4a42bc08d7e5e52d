"""A model that GPTQ made low-bit is exported and saved. At the top: the model, where its tokenizer is, and the folder."""

import sys

from optimum.intel import OVModelForCausalLM
from transformers import AutoTokenizer

model_id, tokenizer_id, save_dir = sys.argv[1:]

# A model that was optimized with GPTQ: no extra step of model optimization.
model = OVModelForCausalLM.from_pretrained(model_id, export=True)

tokenizer = AutoTokenizer.from_pretrained(tokenizer_id)
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=16, do_sample=False)[0]))
model.save_pretrained(save_dir)
