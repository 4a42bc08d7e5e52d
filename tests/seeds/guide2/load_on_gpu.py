"""What the step before saved is loaded in a process of its own, made ready in float16, and answers with four beams.

At the top: the folder, the model, the imports. Mended: the guide asks the model of the first process for its configuration, and
imports neither torch nor IPEX. At the end: how many bytes it takes, and by which algorithm it was made.
"""

import sys

import intel_extension_for_pytorch as ipex
import torch
from neural_compressor.transformers import AutoModelForCausalLM

model_name_or_path = sys.argv[1]

# Load model
loaded_model = AutoModelForCausalLM.from_pretrained(sys.argv[2], trust_remote_code=True)

# The configuration goes along.
quantization_config = loaded_model.quantization_config if hasattr(loaded_model, "quantization_config") else None
loaded_model = ipex.optimize_transformers(
    loaded_model, inplace=True, dtype=torch.float16, quantization_config=quantization_config, device="xpu"
)

# inference
from transformers import AutoTokenizer

prompt = "Once upon a time, a little girl"
tokenizer = AutoTokenizer.from_pretrained(model_name_or_path)
input_ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
generate_kwargs = dict(do_sample=False, temperature=0.9, num_beams=4)
gen_ids = loaded_model.generate(input_ids, **generate_kwargs)
gen_text = tokenizer.batch_decode(gen_ids, skip_special_tokens=True)
print(gen_text)
print(loaded_model.get_memory_footprint(), quantization_config.quant_method)
