"""Two steps of QLoRA on a folder: prints, in MB, what the process held before it loaded, once it had, and at most in the end.

python qlora_memory.py FOLDER
"""

import ctypes
import gc
import sys
from pathlib import Path

import peft
import torch

import lowbit
import lowbit.compat
from lowbit_assets import tiny_model_in_memory


def memory(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def give_back():
    """Hand what is free to the system, so that what a step takes shows; and forget what was held at most so far."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def train(load):
    """The guide's finetuning with a loop of its own; returns what the process held when the model was ready."""
    from bigdl.llm.transformers.qlora import get_peft_model, prepare_model_for_kbit_training

    model = load()
    model.config.use_cache = False
    model.gradient_checkpointing_enable()
    model = prepare_model_for_kbit_training(model)
    config = peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(model, config).train()
    give_back()
    ready = memory("VmRSS")
    ids = torch.arange(3, 35)[None]
    for _ in range(2):
        model(input_ids=ids, labels=ids).loss.backward()
    learnt = [name for name, parameter in model.named_parameters() if parameter.grad is not None]
    assert learnt and all("lora_" in name for name in learnt)
    return ready


with lowbit.compat.install(children=False):
    from bigdl.llm.transformers import AutoModelForCausalLM

    # What a first step imports and sets up is not the model's.
    train(lambda: lowbit.optimize_model(tiny_model_in_memory("llama"), low_bit="nf4"))
    before = memory("VmRSS")
    ready = train(lambda: AutoModelForCausalLM.load_low_bit(sys.argv[1], optimize_model=False))
    print(before, ready, memory("VmHWM"))
