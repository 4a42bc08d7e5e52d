"""Quantise a checkpoint while it streams in, save it, and load it with plain transformers."""

import torch
import transformers
from lowbit.demo import gguf_path

import lowbit

model = lowbit.AutoModelForCausalLM.from_pretrained(gguf_path(), load_in_low_bit="int4")
tokenizer = lowbit.demo.tokenizer()
model.save_low_bit("small", tokenizer=tokenizer)

again = transformers.AutoModelForCausalLM.from_pretrained("small")
prompt = tokenizer("The capital of France is", return_tensors="pt")
with torch.inference_mode():
    first, second = model(**prompt).logits, again(**prompt).logits
assert torch.equal(first, second)
print(tokenizer.decode(again.generate(**prompt, max_new_tokens=8, do_sample=False)[0]))
