"""A model exported by optimum-intel to 4 bits, with activation-aware scaling and estimated scales if it is given texts to look at.

export_optimum.py MODEL OUT SETTINGS        SETTINGS is JSON: bits, sym, group_size, ratio, and `texts`, a list
"""

import json
import sys
from pathlib import Path


def main():
    from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig
    from transformers import AutoTokenizer

    model, out, settings = sys.argv[1], sys.argv[2], json.loads(Path(sys.argv[3]).read_text())
    texts = settings.pop("texts", None)
    if texts:
        looking = {"dataset": texts, "num_samples": len(texts), "tokenizer": model}
        settings |= looking | {"quant_method": "awq", "scale_estimation": True}
    config = OVWeightQuantizationConfig(**settings)
    made = OVModelForCausalLM.from_pretrained(model, export=True, quantization_config=config, compile=False)
    made.save_pretrained(out)
    AutoTokenizer.from_pretrained(model).save_pretrained(out)


if __name__ == "__main__":
    main()
