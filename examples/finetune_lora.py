"""Train a LoRA adapter on a packed model with peft and transformers' Trainer: packed weights stay frozen."""

import peft
import torch
import transformers

import lowbit

torch.manual_seed(0)
source = lowbit.demo.model_path()
lowbit.AutoModelForCausalLM.from_pretrained(source, load_in_low_bit="nf4").save_low_bit("nf4")
model = transformers.AutoModelForCausalLM.from_pretrained("nf4")
tokenizer = transformers.AutoTokenizer.from_pretrained("nf4")
model = peft.prepare_model_for_kbit_training(model)
model = peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))

text = "lowbit keeps each weight in a few bits and trains a small adapter beside it."
ids = tokenizer(text, return_tensors="pt").input_ids[0]
learning = {"max_steps": 6, "learning_rate": 1e-2, "lr_scheduler_type": "constant", "per_device_train_batch_size": 1}
arguments = transformers.TrainingArguments(
    "run", gradient_checkpointing=True, logging_steps=1, save_strategy="no", report_to=[], **learning
)
trainer = transformers.Trainer(model, arguments, train_dataset=[{"input_ids": ids, "labels": ids}] * 6)
trainer.train()
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
print("loss:", ", ".join(f"{value:.2f}" for value in losses))
assert losses[-1] < losses[0] / 2
trainer.save_model("adapter")

# The adapter is an ordinary peft folder: it goes onto the packed model again, or onto the model in full precision.
again = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained("nf4"), "adapter").eval()
with torch.inference_mode():
    loss = again(input_ids=ids[None], labels=ids[None]).loss.item()
print(f"loaded again: {loss:.2f}")
assert loss < losses[0] / 2
