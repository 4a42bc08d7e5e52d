"""A model is exported in 8 bits. At the top: the model and the folder."""

import sys

from optimum.intel import OVModelForCausalLM
from transformers import AutoTokenizer

model_id, model_dir = sys.argv[1:]

model = OVModelForCausalLM.from_pretrained(model_id, export=True, load_in_8bit=True)

tokenizer = AutoTokenizer.from_pretrained(model_id)
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=16, do_sample=False)[0]))
model.save_pretrained(model_dir)
