"""A folder of OpenVINO's is answered from without torch and transformers, with an adapter or without. At the top: both."""

import sys

from lowbit.openvino.native import load

model_dir, lora_adaptor = sys.argv[1:]

# The loop that the guide leaves to its reader: tokenization, inference, token selection, beam search, de-tokenization.
model = load(model_dir, adapters={"tuned": lora_adaptor}, slots=4)
print(model.chat("What is the capital of France?", adapters=(), max_new_tokens=16))
print("".join(map(str, model.stream("Once upon a time", adapters=(), max_new_tokens=16))))
print(model.generate("Once upon a time", adapters=(), max_new_tokens=16))
print(
    model.generate(
        "Once upon a time", adapters=(), num_beams=4, num_beam_groups=2, diversity_penalty=0.5, max_new_tokens=16
    )
)
print(list(model.generate("Once upon a time", max_new_tokens=16).tokens))
print(sorted({"torch", "transformers"} & sys.modules.keys()))
