"""transformers: `model.generate` and a plain loop. Options: `kind` plain, lowbit, torchao-int4 (`group`) or torchao-int8.

With `compile` the steps of one token are compiled while the model is loaded, for caches of any length.

The speed of `generate` is that of the tokens after the first: a call that makes one token is taken off a call that makes
all of them.
"""

import time

import serve


def load(given):
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(given.threads)
    kind = given.options.get("kind", "plain")
    if kind == "lowbit":
        from lowbit import AutoModelForCausalLM as LowBitModel

        model = LowBitModel.load_low_bit(given.model)
    else:
        model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.bfloat16)
    model.eval()
    if kind.startswith("torchao"):
        quantize_with_torchao(model, kind, given.options.get("group", 128))
    step = torch.compile(model) if given.options.get("compile") else model

    def ids(count, seed):
        return torch.tensor([serve.prompt(count, seed)])

    @torch.inference_mode()
    def prefill(context, _new, _sequences, seed):
        start = time.perf_counter()
        model(input_ids=ids(context, seed), logits_to_keep=1)
        return context / (time.perf_counter() - start)

    @torch.inference_mode()
    def decode(context, new, _sequences, seed):
        found = model(input_ids=ids(context, seed), use_cache=True, logits_to_keep=1)
        cache = found.past_key_values
        token = found.logits[:, -1:].argmax(-1)
        start = time.perf_counter()
        for _ in range(new):
            found = step(input_ids=token, past_key_values=cache, use_cache=True)
            token = found.logits[:, -1:].argmax(-1)
        return new / (time.perf_counter() - start)

    def generate(context, new, _sequences, seed):
        def seconds(count):
            start = time.perf_counter()
            model.generate(ids(context, seed), max_new_tokens=count, min_new_tokens=count, do_sample=False)
            return time.perf_counter() - start

        first = min(seconds(1), seconds(1))
        return new / (seconds(1 + new) - first)

    if step is not model:
        decode(32, 4, 1, 0)
    return {"decode": decode, "prefill": prefill, "generate": generate}


def quantize_with_torchao(model, kind, group):
    import torchao.quantization as quantization

    if kind == "torchao-int8":
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
        return
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig

    quantization.quantize_(model, PrototypeInt4WeightOnlyConfig(group_size=group))


if __name__ == "__main__":
    serve.serve(load)
