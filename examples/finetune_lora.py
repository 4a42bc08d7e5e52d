"""Train a LoRA adapter on a packed model with plain peft: packed weights stay frozen, gradients pass through them."""

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

batch = tokenizer("lowbit keeps each weight in a few bits and trains a small adapter beside it.", return_tensors="pt")
optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=5e-3)
losses = []
for _ in range(6):
    loss = model(**batch, labels=batch["input_ids"]).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
print("loss:", ", ".join(f"{value:.2f}" for value in losses))
assert losses[-1] < losses[0] / 2
model.save_pretrained("adapter")
