"""No benchmark: the script of old that `old_apis.py` runs and times, in a process of its own. It prints one line of JSON.

    python -m lowbit.compat old_apis_script.py MODEL --how bf16|w8a8 --task decode|prefill
    python old_apis_script.py MODEL --how plain --task decode

`plain` is transformers alone, in bf16. `bf16` is `ipex.llm.optimize` after it; `w8a8` its two stages of SmoothQuant.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers

PROMPT = {"decode": 32, "prefill": 512}
TOKENS = {"decode": 64, "prefill": 1}
CALIBRATION_SAMPLES, CALIBRATION_LENGTH = 4, 64


def smooth_quantized(model: Any, vocabulary: int) -> Any:
    """As the guide does it: a loop of the caller's own, a summary, and the model made from it."""
    import intel_extension_for_pytorch as ipex
    from intel_extension_for_pytorch.quantization import prepare

    samples = torch.randint(0, vocabulary, (CALIBRATION_SAMPLES, CALIBRATION_LENGTH))
    qconfig = ipex.quantization.get_smooth_quant_qconfig_mapping()
    prepared = prepare(
        ipex.llm.optimize(model.eval(), quantization_config=qconfig), qconfig, example_inputs=samples[:1]
    )
    with torch.no_grad(), TemporaryDirectory() as folder:
        for sample in samples:
            prepared(sample[None])
        summary = str(Path(folder) / "summary.json")
        prepared.save_qconf_summary(qconf_summary=summary)
        return ipex.llm.optimize(model.eval(), quantization_config=qconfig, qconfig_summary_file=summary)


def made(folder: str, how: str) -> Any:
    dtype = torch.float32 if how == "w8a8" else torch.bfloat16
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    if how == "plain":
        return model
    import intel_extension_for_pytorch as ipex

    if how == "w8a8":
        return smooth_quantized(model, model.config.vocab_size)
    return ipex.llm.optimize(model, dtype=torch.bfloat16)


def seconds(model: Any, ids: torch.Tensor, tokens: int) -> float:
    start = time.perf_counter()
    found = model.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
    assert found.shape[1] == ids.shape[1] + tokens
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--how", choices=("plain", "bf16", "w8a8"), required=True)
    parser.add_argument("--task", choices=tuple(PROMPT), required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model = made(options.model, options.how)
    ids = torch.randint(3, model.config.vocab_size, (1, PROMPT[options.task]))
    tokens = TOKENS[options.task]
    seconds(model, ids, tokens)  # the first run lays things out
    found = [seconds(model, ids, tokens) for _ in range(options.repeats)]
    if options.task == "decode":  # what the later tokens take
        found = [all_of - seconds(model, ids, 1) for all_of in found]
        per_second = (tokens - 1) / statistics.median(found)
    else:
        per_second = PROMPT["prefill"] / statistics.median(found)
    print(json.dumps({"tokens_per_second": per_second}))


if __name__ == "__main__":
    main()
