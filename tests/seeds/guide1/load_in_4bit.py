"""A model is packed to four bits while it loads, saved for the next script, and moved to an Intel GPU.

The model and the folder are arguments. The guide leaves the saving to another page.
"""

import sys

import intel_extension_for_pytorch as ipex
from bigdl.llm.transformers import AutoModelForCausalLM

model_path, saved_dir = sys.argv[1:]

# Load model in 4 bit, which convert the relevant layers in the model into INT4 format
model = AutoModelForCausalLM.from_pretrained(model_path, load_in_4bit=True)
model.save_low_bit(saved_dir)

model = model.to("xpu")  # Important after obtaining the optimized model
print("device", model.device.type)
