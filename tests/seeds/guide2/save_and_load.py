"""A model made low-bit by RTN is saved and loaded again. At the top: the model and the folder.

At the end: that the loaded model gives the same logits, by the class that made it and by plain transformers, and its configuration.
"""

import sys

# quant
from neural_compressor.transformers import AutoModelForCausalLM, RtnConfig

model_name_or_path = sys.argv[1]
woq_config = RtnConfig(bits=4)
q_model = AutoModelForCausalLM.from_pretrained(
    model_name_or_path,
    quantization_config=woq_config,
)

# save quant model
saved_dir = sys.argv[2]
q_model.save_pretrained(saved_dir)

# load quant model
loaded_model = AutoModelForCausalLM.from_pretrained(saved_dir)

# What the test looks at: that both are the same, by plain transformers too.
import torch
import transformers

ids = torch.tensor([[504, 3575, 282, 4649, 314]])
plain = transformers.AutoModelForCausalLM.from_pretrained(saved_dir)
with torch.no_grad():
    same = [torch.equal(q_model(ids).logits, model(ids).logits) for model in (loaded_model, plain)]
print(same, loaded_model.quantization_config.to_dict() == woq_config.to_dict())
