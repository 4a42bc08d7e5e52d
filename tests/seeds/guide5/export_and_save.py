"""A model is exported, saved, loaded again and put on a device. At the top: the model, the folder and the device."""

import sys

model_id, model_dir, device = sys.argv[1:]

# -from transformers import AutoModelForCausalLM
from optimum.intel import OVModelForCausalLM
from transformers import AutoTokenizer, pipeline

# -model = AutoModelForCausalLM.from_pretrained(model_id)
model = OVModelForCausalLM.from_pretrained(model_id, export=True)
tokenizer = AutoTokenizer.from_pretrained(model_id)
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=16, do_sample=False)[0]))

model.save_pretrained(model_dir)

model_id = model_dir
model = OVModelForCausalLM.from_pretrained(model_id)
model.to(device)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=16, do_sample=False)[0]))

model = OVModelForCausalLM.from_pretrained(model_id, device=device)
pipe = pipeline("text-generation", model=model, tokenizer=AutoTokenizer.from_pretrained(model_id))
print(pipe("Once upon a time", max_new_tokens=16, do_sample=False)[0]["generated_text"])
