"""QLoRA as BigDL-LLM's guide does it: an nf4 model, peft's own LoraConfig, transformers' Trainer; and what merging gives."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import lowbit
import lowbit.compat
from lowbit.errors import RecipeError
from lowbit.layers import packed_weights
from unit.checkpoint_cases import EVEN, IDS, logits, make

pytestmark = pytest.mark.transformers
peft = pytest.importorskip("peft")


@pytest.fixture(autouse=True)
def old_names() -> Iterator[None]:
    with lowbit.compat.install(children=False):
        yield


def load(folder: Path) -> Any:
    from bigdl.llm.transformers import AutoModelForCausalLM  # type: ignore[import-not-found]

    return AutoModelForCausalLM.from_pretrained(
        folder,
        load_in_low_bit="nf4",
        optimize_model=False,
        torch_dtype=torch.float16,
        modules_to_not_convert=["lm_head"],
    )


def test_the_guides_finetuning(tmp_path: Path) -> None:
    from bigdl.llm.transformers.qlora import get_peft_model, prepare_model_for_kbit_training  # type: ignore[import-not-found]

    torch.manual_seed(0)
    folder = make("llama", tmp_path / "dense", **EVEN)
    model = load(folder)
    packed = {name: weight.packed().codes.clone() for name, weight in packed_weights(model).items()}
    assert packed and not [name for name in packed if "lm_head" in name]
    model.gradient_checkpointing_enable()
    model = prepare_model_for_kbit_training(model)
    config = peft.LoraConfig(
        r=8,
        lora_alpha=32,
        target_modules=["q_proj", "k_proj", "v_proj"],
        lora_dropout=0.05,
        bias="none",
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(model, config)
    assert model.get_base_model().is_gradient_checkpointing
    learning = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert learning and all("lora_" in name for name in learning)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path / "run"),
        max_steps=8,
        per_device_train_batch_size=2,
        learning_rate=5e-2,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=0,
    )
    rows = [{"input_ids": IDS[0], "labels": IDS[0]}] * 16
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=rows)
    model.config.use_cache = False
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.1
    for name, weight in packed_weights(model.get_base_model()).items():
        # The base did not learn, and never lay there unpacked.
        assert torch.equal(weight.packed().codes, packed[name.replace(".base_layer", "")])
    model.eval()
    trained = logits(model)

    model.save_pretrained(tmp_path / "adapter")
    fields = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert fields["peft_type"] == "LORA" and "training_mode" not in fields
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    _merges_to_the_same(tmp_path, trained)


def _merges_to_the_same(place: Path, trained: torch.Tensor) -> None:
    """On the low-bit base unpacked, merging gives what base and adapter gave; on the original, what they give together."""
    from bigdl.llm.transformers.qlora import prepare_model_for_kbit_training

    base = prepare_model_for_kbit_training(load(place / "dense").float())
    with_adapter = peft.PeftModel.from_pretrained(base, place / "adapter").eval()
    before = logits(with_adapter)
    torch.testing.assert_close(before, trained, rtol=1e-2, atol=1e-2)  # trained in fp16
    unpacked = load(place / "dense").float().dequantize(torch.float32)
    merged = peft.PeftModel.from_pretrained(unpacked, place / "adapter").merge_and_unload().eval()
    torch.testing.assert_close(logits(merged), before, rtol=1e-4, atol=1e-4)
    original = transformers.AutoModelForCausalLM.from_pretrained(place / "dense", dtype=torch.float32)
    both = peft.PeftModel.from_pretrained(original, place / "adapter").eval()
    expected = logits(both)
    merged = both.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)
    merged.save_pretrained(place / "merged")
    again = lowbit.AutoModelForCausalLM.from_pretrained(place / "merged", load_in_4bit=True)
    assert again.lowbit_report.layers


def test_old_lora_config_saves_as_pefts(tmp_path: Path) -> None:
    from ipex_llm.transformers.qlora import LoraConfig, PeftModel, cast_lora_weight, get_peft_model  # type: ignore[import-not-found]

    folder = make("llama", tmp_path / "dense", **EVEN)
    model = get_peft_model(load(folder), LoraConfig(r=2, target_modules=["q_proj"], training_mode="qlora"))
    cast_lora_weight(model, torch.bfloat16)
    lora = next(p for n, p in model.named_parameters() if "lora_A" in n)
    assert lora.dtype == torch.bfloat16
    model.save_pretrained(tmp_path / "adapter")
    assert PeftModel is peft.PeftModel
    assert isinstance(peft.PeftConfig.from_pretrained(tmp_path / "adapter"), peft.LoraConfig)
    with pytest.raises(RecipeError, match="qalora"):
        LoraConfig(training_mode="qalora")
