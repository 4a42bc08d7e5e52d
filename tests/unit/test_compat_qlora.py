"""QLoRA as BigDL-LLM's guide does it: an nf4 model, peft's own LoraConfig, transformers' Trainer; and what merging gives."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
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
from lowbit_assets import tiny_model_in_memory
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


def test_nothing_of_a_weights_size_is_kept_for_the_gradient(tmp_path: Path) -> None:
    """Without gradient checkpointing, which would keep less: autograd saves activations, adapters, and weights as they lie."""
    model = load(make("llama", tmp_path / "dense", **EVEN)).float()
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"])).train()
    smallest = min(math.prod(weight.shape) for weight in packed_weights(model.get_base_model()).values())
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(input_ids=IDS[:, :4], labels=IDS[:, :4]).loss
    loss.backward()
    large = [t.shape for t in kept if t.numel() >= smallest and t.untyped_storage().data_ptr() not in own]
    assert len(kept) > 20 and not large
    assert all(p.grad is not None for name, p in model.named_parameters() if "lora_B" in name)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="what a process holds is read from Linux's /proc")
def test_training_needs_no_copy_in_full_precision(tmp_path: Path) -> None:
    """In a process of its own: 67 million weights, 270 MB in fp32 and 36 MB in the folder."""
    wide = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "num_key_value_heads": 8}
    model = tiny_model_in_memory("llama", num_hidden_layers=16, tie_word_embeddings=False, **wide)
    dense = sum(parameter.nbytes for parameter in model.parameters()) / 2**20
    lowbit.optimize_model(model, low_bit="nf4", modules_to_not_convert=["lm_head"]).save_low_bit(tmp_path / "low")
    child = Path(__file__).with_name("qlora_memory.py")
    command = [sys.executable, str(child), str(tmp_path / "low")]
    paths = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=paths)
    assert done.returncode == 0, done.stderr
    before, ready, most = map(float, done.stdout.split())
    # 58 MB for the steps, of which 4 are one weight in fp32, and 77 for the model; a copy of it in half precision alone takes 129.
    assert most - ready < dense / 2
    assert most - before < dense


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
    _merges_into_packed_weights(place, with_adapter, merged, before)
    original = transformers.AutoModelForCausalLM.from_pretrained(place / "dense", dtype=torch.float32)
    both = peft.PeftModel.from_pretrained(original, place / "adapter").eval()
    expected = logits(both)
    merged = both.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)
    merged.save_pretrained(place / "merged")
    again = lowbit.AutoModelForCausalLM.from_pretrained(place / "merged", load_in_4bit=True)
    assert again.lowbit_report.layers


def _merges_into_packed_weights(place: Path, with_adapter: Any, merged: Any, expected: torch.Tensor) -> None:
    """The sum is rounded to nf4 once more: as far from the exact one as if that one had been rounded, and as it is saved."""
    with with_adapter.disable_adapter():
        learnt = float((logits(with_adapter) - expected).norm())
    with pytest.warns(UserWarning, match="rounded to nf4 again"):
        packed = with_adapter.merge_and_unload().eval()
    formats = {name: weight.format.name for name, weight in packed_weights(packed).items()}
    assert set(formats.values()) == {"nf4"} and not any("lora" in name for name, _ in packed.named_modules())
    rounded = lowbit.optimize_model(merged, low_bit="nf4", modules_to_not_convert=["lm_head"], compute="fp32")
    torch.testing.assert_close(logits(packed), logits(rounded), rtol=1e-3, atol=1e-3)
    assert 0 < float((logits(packed) - expected).norm()) < 0.4 * learnt
    packed.save_low_bit(place / "packed")
    again = lowbit.AutoModelForCausalLM.load_low_bit(place / "packed", compute="fp32", dtype=torch.float32)
    torch.testing.assert_close(logits(again), logits(packed), rtol=1e-4, atol=1e-4)


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
