"""A model on an Intel GPU, made ready in float16 by `ipex.optimize_transformers`, goes on with a story that is drawn.

At the top: the model, and a seed for what is drawn. Mended: the guide uses the tokenizer before it makes it, writes
quantizaiton_config in one place, and leaves the prompt on the CPU while the model is on the GPU.
"""

import sys

import intel_extension_for_pytorch as ipex
from neural_compressor.transformers import AutoModelForCausalLM
from transformers import AutoTokenizer
import torch

torch.manual_seed(0)

model_name_or_path = sys.argv[1]
prompt = "Once upon a time, a little girl"
tokenizer = AutoTokenizer.from_pretrained(model_name_or_path, trust_remote_code=True)
input_ids = tokenizer(prompt, return_tensors="pt")["input_ids"].to("xpu")

q_model = AutoModelForCausalLM.from_pretrained(model_name_or_path, device_map="xpu", trust_remote_code=True)

quantization_config = q_model.quantization_config if hasattr(q_model, "quantization_config") else None
q_model = ipex.optimize_transformers(
    q_model, inplace=True, dtype=torch.float16, quantization_config=quantization_config, device="xpu"
)

output = q_model.generate(input_ids, max_new_tokens=100, do_sample=True)
print(tokenizer.batch_decode(output, skip_special_tokens=True))
print(q_model.dtype)
