"""Eight bits for weights and activations in two stages: what activations reach is seen and saved as JSON, then the model is made.

Mended: `enumerate` gives a number beside each sample, and `generate` takes parameters. The data set is a text file, cut into
samples. At the end: what it said, how far it is from the original, and in which numbers a layer multiplies.
"""

import sys

import torch

#################### code changes ####################
import intel_extension_for_pytorch as ipex
from intel_extension_for_pytorch.quantization import prepare

######################################################
import transformers
from torch.utils.data import DataLoader

model_name_or_path, text_file = sys.argv[1:3]
qconfig_summary_file_path = "qconfig.json"
tokenizer = transformers.AutoTokenizer.from_pretrained(model_name_or_path)
with open(text_file) as file:  # noqa: PTH123 - as its users write it
    tokens = tokenizer(file.read(), return_tensors="pt").input_ids[0]
your_calibration_dataset = [tokens[i : i + 64] for i in range(0, 8 * 64, 64)]

# load model
model = transformers.AutoModelForCausalLM.from_pretrained(model_name_or_path).eval()
#################### code changes ####################
qconfig = ipex.quantization.get_smooth_quant_qconfig_mapping()
# stage 1: calibration
# prepare your calibration dataset samples
calib_dataset = DataLoader(your_calibration_dataset)
example_inputs = next(iter(calib_dataset))  # get one sample input from calib_samples
calibration_model = ipex.llm.optimize(
    model.eval(),
    quantization_config=qconfig,
)
prepared_model = prepare(calibration_model.eval(), qconfig, example_inputs=example_inputs)
with torch.no_grad():
    for _, calib_samples in enumerate(calib_dataset):
        prepared_model(calib_samples)
prepared_model.save_qconf_summary(qconf_summary=qconfig_summary_file_path)

# stage 2: quantization
original = model
model = ipex.llm.optimize(
    model.eval(),
    quantization_config=qconfig,
    qconfig_summary_file=qconfig_summary_file_path,
)
######################################################

# generation inference loop
input_ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
with torch.inference_mode():
    output = model.generate(input_ids, max_new_tokens=12, do_sample=False)
print(tokenizer.decode(output[0], skip_special_tokens=True))

held_out = tokens[None, 8 * 64 : 8 * 64 + 128]
with torch.inference_mode():
    expected, found = (m(held_out).logits.float().log_softmax(-1) for m in (original, model))
print(float((expected.exp() * (expected - found)).sum(-1).mean()))

# Whether a layer multiplies int8 by int8. Inputs that reach 127 everywhere are rounded to whole numbers, and the sums are those of
# whole numbers, which the exact product of what lies between them is not.
from lowbit.bits import unpack_codes

layer = model.model.layers[0].mlp.up_proj
held = layer.packed_weight
packed = held.packed()
weight = (unpack_codes(packed.codes, 8, layer.in_features).int() - 128).to(torch.int8)
torch.manual_seed(0)
whole = torch.randint(-100, 101, (4, layer.in_features))
between = torch.rand(whole.shape) * 0.8 - 0.4
whole[:, ::32], between[:, ::32] = 127, 0
with torch.inference_mode():
    found, steps = layer(whole + between), packed.scales.float().T
    sums, exact = (whole.int() @ weight.int().T) * steps, ((whole + between) @ weight.float().T) * steps
off = [float((found - product).norm() / exact.norm()) for product in (sums, exact)]
print(
    held.format,
    held.kernel.name,
    packed.codes.nbytes / weight.numel(),
    "whole:",
    off[0] < 1e-5,
    "exact:",
    off[1] < 1e-4,
)
