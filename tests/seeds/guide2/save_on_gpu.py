"""A model is made low-bit for an Intel GPU and saved, for a process of its own to load. At the top: the model and the folder.

Mended: the guide ends the call with a comma of another script. At the end: how many bytes the model takes.
"""

import sys

from neural_compressor.transformers import AutoModelForCausalLM, RtnConfig

model_name_or_path = sys.argv[1]
woq_config = RtnConfig(bits=4)
q_model = AutoModelForCausalLM.from_pretrained(
    model_name_or_path,
    quantization_config=woq_config,
    device_map="xpu",
    trust_remote_code=True,
)

# Saving comes before ipex.optimize_transformers.
q_model.save_pretrained(sys.argv[2])

print(q_model.get_memory_footprint())
