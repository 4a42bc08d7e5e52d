import sys

import intel_extension_for_pytorch as ipex
from bigdl.llm.transformers import AutoModelForCausalLM

model_path, saved_dir = sys.argv[1:]

# Load model in 4 bit, which convert the relevant layers in the model into INT4 format
model = AutoModelForCausalLM.from_pretrained(model_path, load_in_4bit=True)
model.save_low_bit(saved_dir)

model = model.to("xpu")  # Important after obtaining the optimized model
print("device", model.device.type)
