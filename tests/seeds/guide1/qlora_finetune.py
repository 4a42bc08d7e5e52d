"""QLoRA to its end: adapters on a model in nf4 learn quotes with transformers' Trainer, and are saved.

The guide ends where "the rest is just the same as regular LoRA finetuning"; that rest is here. It names torch.float16 without
importing torch: mended here. At the end: the losses.
"""

import sys

import torch
import transformers
import intel_extension_for_pytorch as ipex
from bigdl.llm.transformers import AutoModelForCausalLM

model_path, output_dir = sys.argv[1:]
torch.manual_seed(0)
model = AutoModelForCausalLM.from_pretrained(
    model_path,
    load_in_low_bit="nf4",
    optimize_model=False,
    torch_dtype=torch.float16,
    modules_to_not_convert=["lm_head"],
)
model = model.to("xpu")

from bigdl.llm.transformers.qlora import prepare_model_for_kbit_training

model.gradient_checkpointing_enable()
model = prepare_model_for_kbit_training(model)

from bigdl.llm.transformers.qlora import get_peft_model
from peft import LoraConfig

config = LoraConfig(
    r=8,
    lora_alpha=32,
    target_modules=["q_proj", "k_proj", "v_proj"],
    lora_dropout=0.05,
    bias="none",
    task_type="CAUSAL_LM",
)
model = get_peft_model(model, config)
model.print_trainable_parameters()

tokenizer = transformers.AutoTokenizer.from_pretrained(model_path)
tokenizer.pad_token = tokenizer.eos_token
quotes = [
    "“To be, or not to be, that is the question.” ->: ['shakespeare', 'doubt']",
    "“Be yourself; everyone else is already taken.” ->: ['honesty', 'wit']",
] * 8
data = [tokenizer(quote) for quote in quotes]
trainer = transformers.Trainer(
    model=model,
    train_dataset=data,
    args=transformers.TrainingArguments(
        per_device_train_batch_size=2,
        max_steps=6,
        learning_rate=2e-3,
        logging_steps=1,
        output_dir=output_dir,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        seed=0,
    ),
    data_collator=transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False),
)
model.config.use_cache = False  # silence the warnings. Please re-enable for inference!
trainer.train()
model.save_pretrained(output_dir)
print("losses", *[round(entry["loss"], 4) for entry in trainer.state.log_history if "loss" in entry])
