"""Guide 2, quantising for an Intel GPU and saving. At the top: the model and the folder.

Mended: the guide ends the call with a comma of another script.
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
