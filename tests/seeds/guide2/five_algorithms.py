"""One model made low-bit by each of five algorithms, RTN, AWQ, TEQ, GPTQ and AutoRound, and an answer found with four beams.

The model is an argument: two layers of SmolLM2 in the tests, because TEQ takes as many steps for every layer as it ever does.
At the top: what the algorithms that look at text look at. The guide leaves that to the defaults, a data set that has to be fetched,
128 windows of 2048 tokens and 200 steps; on a processor that takes hours. At the end: how far each is from the original, whether
both would go on with the same word, how large.
"""

import sys

model_name_or_path = sys.argv[1]
DATA = {"dataset": sys.argv[2], "n_samples": 4, "seq_len": 64}
STEPS = {"iters": 4}

# RTN
from neural_compressor.transformers import AutoModelForCausalLM, RtnConfig

woq_config = RtnConfig(bits=4)
q_model = AutoModelForCausalLM.from_pretrained(
    model_name_or_path,
    quantization_config=woq_config,
)
models = {"rtn": q_model}

# AWQ
from neural_compressor.transformers import AutoModelForCausalLM, AwqConfig

woq_config = AwqConfig(bits=4, **DATA)
q_model = AutoModelForCausalLM.from_pretrained(
    model_name_or_path,
    quantization_config=woq_config,
)
models["awq"] = q_model

# TEQ
from transformers import AutoTokenizer
from neural_compressor.transformers import AutoModelForCausalLM, TeqConfig

tokenizer = AutoTokenizer.from_pretrained(model_name_or_path)
woq_config = TeqConfig(bits=4, tokenizer=tokenizer, **DATA)
q_model = AutoModelForCausalLM.from_pretrained(
    model_name_or_path,
    quantization_config=woq_config,
)
models["teq"] = q_model

# GPTQ
from transformers import AutoTokenizer
from neural_compressor.transformers import AutoModelForCausalLM, GPTQConfig

tokenizer = AutoTokenizer.from_pretrained(model_name_or_path)
woq_config = GPTQConfig(bits=4, tokenizer=tokenizer, **DATA)
woq_model = AutoModelForCausalLM.from_pretrained(
    model_name_or_path,
    quantization_config=woq_config,
)
models["gptq"] = woq_model

# AutoRound
from transformers import AutoTokenizer
from neural_compressor.transformers import AutoModelForCausalLM, AutoRoundConfig

tokenizer = AutoTokenizer.from_pretrained(model_name_or_path)
woq_config = AutoRoundConfig(bits=4, tokenizer=tokenizer, **DATA, **STEPS)
woq_model = AutoModelForCausalLM.from_pretrained(
    model_name_or_path,
    quantization_config=woq_config,
)
models["autoround"] = woq_model

# inference
from transformers import AutoTokenizer

prompt = "Once upon a time, a little girl"
tokenizer = AutoTokenizer.from_pretrained(model_name_or_path)

input_ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
generate_kwargs = dict(do_sample=False, temperature=0.9, num_beams=4)
gen_ids = q_model.generate(input_ids, **generate_kwargs)
gen_text = tokenizer.batch_decode(gen_ids, skip_special_tokens=True)
print(gen_text)

# What the test looks at: how far each is from the original, whether both go on with the same word, and how large.
import json

import torch
import transformers

original = transformers.AutoModelForCausalLM.from_pretrained(model_name_or_path)
with torch.no_grad():
    expected = original(input_ids).logits[0, -1].log_softmax(-1)
    logits = {name: model(input_ids).logits[0, -1].log_softmax(-1) for name, model in models.items()}
found = {
    name: {
        "kl": torch.nn.functional.kl_div(logits[name], expected, log_target=True, reduction="sum").item(),
        "same": bool(logits[name].argmax() == expected.argmax()),
        "bytes": model.get_memory_footprint(),
        "method": model.quantization_config.quant_method,
    }
    for name, model in models.items()
}
print(json.dumps({"original": original.get_memory_footprint()} | found))
