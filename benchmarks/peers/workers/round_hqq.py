"""hqq, by its own defaults but for the direction of groups. Settings: `bits`, `group`, `axis` (1: along the inputs)."""

import rounding
import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear


def round_model(settings, given, tokens, meter):
    model = rounding.load_model(given.model, given.device)
    weights = rounding.dense_weights(model)
    linears = {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and name != "lm_head"}
    packed = {}
    with meter:
        for name, linear in linears.items():
            group = settings["group"] or linear.in_features
            config = BaseQuantizeConfig(nbits=settings["bits"], group_size=group, axis=settings["axis"])
            packed[name] = HQQLinear(
                linear, config, compute_dtype=torch.float16, device=given.device, del_orig=False, initialize=True
            )
    weights |= {f"{name}.weight": held.dequantize() for name, held in packed.items()}
    return weights, {"zero_bits": 16}  # scales and zero points are both kept in fp16


if __name__ == "__main__":
    rounding.serve(round_model)
