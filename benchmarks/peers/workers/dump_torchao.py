"""The weights of a model that torchao made low-bit, written as dense float32: `dump_torchao.py MODEL OUT KIND GROUP`.

Its packing for a CPU cannot be opened again, so each linear layer multiplies the unit matrix: what comes out is the weight as
torchao's own product reads it, in bf16. The embedding stays as it was, apart from a head that shared it.
"""

import sys

import torch
from run_transformers import quantize_with_torchao
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM


@torch.inference_mode()
def main():
    source, out, kind, group = sys.argv[1:]
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).eval()
    table = model.get_input_embeddings().weight.float()
    quantize_with_torchao(model, kind, int(group))
    found = {"model.embed_tokens.weight": table}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            unit = torch.eye(module.in_features, dtype=torch.bfloat16)
            found[f"{name}.weight"] = module(unit).T.float().contiguous()
    save_file(found, out)


if __name__ == "__main__":
    main()
