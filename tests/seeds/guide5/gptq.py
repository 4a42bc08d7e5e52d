"""A model that GPTQ made low-bit is exported. At the top: the model, and where its tokenizer is."""

import sys

from optimum.intel import OVModelForCausalLM
from transformers import AutoTokenizer

model_id, tokenizer_id = sys.argv[1:]

# A model that was optimized with GPTQ: no extra step of model optimization.
model = OVModelForCausalLM.from_pretrained(model_id, export=True)

tokenizer = AutoTokenizer.from_pretrained(tokenizer_id)
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=16, do_sample=False)[0]))
print(
    sorted(
        {
            op.get_element_type().get_type_name()
            for op in model.model.get_ordered_ops()
            if op.get_type_name() == "Constant"
        }
    )
)
