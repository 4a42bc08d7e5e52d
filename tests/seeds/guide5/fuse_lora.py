"""An adapter is fused into its model, and that is exported. At the top: the model and the adapter."""

import sys

from optimum.intel import OVModelForCausalLM
from peft import PeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer

model_id, lora_adaptor = sys.argv[1:]

model = AutoModelForCausalLM.from_pretrained(model_id, use_cache=True)
model = PeftModelForCausalLM.from_pretrained(model, lora_adaptor)
model.merge_and_unload()
model.get_base_model().save_pretrained("fused_lora_model")

tokenizer = AutoTokenizer.from_pretrained(model_id)
tokenizer.save_pretrained("fused_lora_model")
model = OVModelForCausalLM.from_pretrained("fused_lora_model", export=True)
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(model.generate(**inputs, max_new_tokens=16, do_sample=False)[0].tolist())
model.save_pretrained("fused_lora_openvino")
