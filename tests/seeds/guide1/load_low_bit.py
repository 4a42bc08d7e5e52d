"""A model that was saved in four bits is loaded as it is, and moved to an Intel GPU. The folder is an argument."""

import sys

import intel_extension_for_pytorch as ipex
from bigdl.llm.transformers import AutoModelForCausalLM

saved_dir = sys.argv[1]
model = AutoModelForCausalLM.load_low_bit(saved_dir)  # Load the optimized model

model = model.to("xpu")  # Important after obtaining the optimized model
print("device", model.device.type)
