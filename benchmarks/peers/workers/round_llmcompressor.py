"""llm-compressor, by its own defaults. Settings: `algorithm` gptq, awq or smoothquant, `bits`, `group`, `symmetric`.

And `observer`, where scales are not to be found as they are by default, from the largest weight.
"""

import rounding
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier


def modifiers(settings):
    groups = {"strategy": "group", "group_size": settings["group"]} if settings["group"] else {"strategy": "channel"}
    found = {"observer": settings["observer"]} if "observer" in settings else {}
    weights = QuantizationArgs(num_bits=settings["bits"], symmetric=settings["symmetric"], **groups, **found)
    activations = None
    if settings["algorithm"] == "smoothquant":
        activations = QuantizationArgs(num_bits=8, symmetric=True, strategy="token", dynamic=True)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights, input_activations=activations)
    asked = {"config_groups": {"group_0": scheme}, "ignore": ["lm_head"]}
    return {
        "gptq": lambda: [GPTQModifier(**asked)],
        "awq": lambda: [AWQModifier(), QuantizationModifier(**asked)],
        "smoothquant": lambda: [SmoothQuantModifier(), QuantizationModifier(**asked)],
    }[settings["algorithm"]]()


def round_model(settings, given, tokens, meter):
    model = rounding.load_model(given.model, given.device)
    data = Dataset.from_dict({"input_ids": tokens.tolist(), "attention_mask": torch.ones_like(tokens).tolist()})
    with meter:
        oneshot(
            model=model,
            dataset=data,
            recipe=modifiers(settings),
            max_seq_length=tokens.shape[1],
            num_calibration_samples=len(tokens),
        )
    weights = rounding.dense_weights(model)
    for name, module in model.named_modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is not None and scheme.weights is not None:
            zero = getattr(module, "weight_zero_point", None)
            weights[f"{name}.weight"] = fake_quantize(
                module.weight.data, module.weight_scale.data, zero, scheme.weights
            )
    kept = {name: weight for name, weight in weights.items() if not name.endswith(("_scale", "_zero_point", "_g_idx"))}
    return kept, {"zero_bits": 0 if settings["symmetric"] else settings["bits"]}


if __name__ == "__main__":
    rounding.serve(round_model)
