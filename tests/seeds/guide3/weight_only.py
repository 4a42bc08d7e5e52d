"""A model of which the weights alone are low-bit, in one of several types, multiplied in one of several, or read from a checkpoint.

Which weight type, which lowp mode and which checkpoint come as arguments, because the block names several; so does group_size,
which the block leaves at -1. Mended: the class was called where `from_pretrained` is meant. At the end: what it said, how far it is
from the original, a layer, bits for each weight.
"""

import sys

import torch
import intel_extension_for_pytorch as ipex
import transformers

model_name_or_path, weight_dtype, lowp_mode, group_size = sys.argv[1:5]

model = transformers.AutoModelForCausalLM.from_pretrained(model_name_or_path).eval()
original = model

qconfig = ipex.quantization.get_weight_only_quant_qconfig_mapping(
    weight_dtype=ipex.quantization.WoqWeightDtype[weight_dtype],  # or INT4/NF4
    lowp_mode=ipex.quantization.WoqLowpMode[lowp_mode],  # or FP16, BF16, INT8
    group_size=int(group_size),
)

checkpoint = None  # optionally load int4 or int8 checkpoint
if len(sys.argv) > 5:
    checkpoint = torch.load(sys.argv[5])
model = ipex.llm.optimize(model, quantization_config=qconfig, low_precision_checkpoint=checkpoint)

# inference with model.generate()
tokenizer = transformers.AutoTokenizer.from_pretrained(model_name_or_path)
input_ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
with torch.inference_mode():
    output = model.generate(input_ids, max_new_tokens=12, do_sample=False)
print(tokenizer.decode(output[0], skip_special_tokens=True))
with torch.inference_mode():
    expected, found = (m(output).logits.float().log_softmax(-1) for m in (original, model))
print(float((expected.exp() * (expected - found)).sum(-1).mean()))
layer = model.model.layers[0].mlp.up_proj
print(type(layer).__name__, layer.weight.dtype, layer.packed_weight.format, layer.packed_weight.compute)
print(model.lowbit_report.bits_per_weight)
