"""transformers' Trainer with peft's LoRA on a low-bit model: the loss falls, and the adapter is an ordinary one."""

import json
from pathlib import Path

import pytest
import torch
import transformers

import lowbit
from unit.checkpoint_cases import EVEN, IDS, logits, make

pytestmark = pytest.mark.transformers


def test_trainer_with_lora_and_gradient_checkpointing(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    folder = make("llama", tmp_path / "dense", **EVEN)
    lowbit.AutoModelForCausalLM.from_pretrained(folder, load_in_4bit=True).save_low_bit(tmp_path / "low")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "low")
    untrained = logits(base)
    base = peft.prepare_model_for_kbit_training(base, use_gradient_checkpointing=True)
    lora = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, lora)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path / "run"),
        max_steps=6,
        per_device_train_batch_size=2,
        learning_rate=2e-2,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        logging_steps=1,
        save_steps=6,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=0,
    )
    rows = [{"input_ids": IDS[0], "labels": IDS[0]}] * 12
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 6 and losses[-1] < losses[0] - 0.1
    model.eval()
    trained = logits(model)
    assert not torch.allclose(trained, untrained, atol=1e-2)

    trainer.save_model(str(tmp_path / "adapter"))
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "run" / "checkpoint-6" / "adapter_model.safetensors").is_file()
    fresh = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "low")
    again = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
    assert torch.equal(logits(again), trained)
    with again.disable_adapter():
        assert torch.equal(logits(again), untrained)
