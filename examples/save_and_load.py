"""Quantise a checkpoint while it streams in, save it, and load it with plain transformers."""

import torch
import transformers

import lowbit

model = lowbit.AutoModelForCausalLM.from_pretrained(lowbit.demo.model_path(), load_in_low_bit="int4")
model.save_low_bit("small")

again = transformers.AutoModelForCausalLM.from_pretrained("small")
tokenizer = transformers.AutoTokenizer.from_pretrained("small")
prompt = tokenizer("The capital of France is", return_tensors="pt")
with torch.inference_mode():
    first, second = model(**prompt).logits, again(**prompt).logits
assert torch.equal(first, second)
print(tokenizer.decode(again.generate(**prompt, max_new_tokens=8, do_sample=False)[0]))
