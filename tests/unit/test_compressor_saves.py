"""Folders that Neural Compressor saved: each method in its one layout, read by its face and by lowbit's own classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import lowbit
import lowbit.compat
from interop.packed_linears import awq_linear, gptq_linear
from lowbit.compat.ignored import CompatWarning
from lowbit.errors import CheckpointError, LowbitError
from lowbit.layers import packed_weights
from unit.checkpoint_cases import EVEN, logits, make
from unit.test_old_saves import in_fp32

pytestmark = [pytest.mark.transformers, pytest.mark.filterwarnings(f"ignore::{CompatWarning.__module__}.CompatWarning")]
METHODS = {
    "rtn": {"sym": True},
    "gptq": {
        "sym": False,
        "desc_act": True,
        "damp_percent": 0.1,
        "n_samples": 128,
        "seq_len": 2048,
        "true_sequential": False,
    },
    "awq": {
        "sym": False,
        "zero_point": True,
        "auto_scale": True,
        "auto_clip": True,
        "absorb_layer_dict": {},
        "backend": "inc",
    },
    "teq": {"sym": True, "absorb_layer_dict": {}, "folding": False},
    "autoround": {"sym": False, "disable_quanted_input": True, "export_format": "itrex"},
}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("llama", tmp_path_factory.mktemp("compressor") / "dense", **EVEN)


def saved(dense: Path, folder: Path, method: str, bits: int = 4, **more: Any) -> tuple[Path, Any]:
    """A folder as that library leaves it, and the same model with the numbers that its weights mean."""
    model = transformers.AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    own = METHODS[method] | more
    tensors = dict(model.state_dict())
    for path, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear) or path == "lm_head":
            continue
        weight = tensors.pop(f"{path}.weight")
        if own.get("backend") == "gemm":
            packed, meant = awq_linear(weight, 32)
        else:
            packed, meant = gptq_linear(weight, bits, 32, own.get("desc_act", False), own["sym"])
            packed["scales"] = packed["scales"].float()  # as its CPU models have them
            packed["bias"] = torch.zeros(len(weight))
        tensors |= {f"{path}.{part}": tensor.contiguous() for part, tensor in packed.items()}
        module.weight.data = meant
    folder.mkdir()
    save_file(
        {name: tensor.clone() for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    fields = {
        "bits": bits,
        "group_size": 32,
        "compute_dtype": "fp32",
        "scale_dtype": "fp32",
        "weight_dtype": f"int{bits}",
    }
    fields |= {"quant_method": method, "quant_lm_head": False, "modules_to_not_convert": ["lm_head"], "model_path": ""}
    config = json.loads((dense / "config.json").read_text()) | {"quantization_config": fields | own}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "quantize_config.json").write_text(json.dumps(fields | own))
    (folder / "all_checkpoint_keys.json").write_text(json.dumps({"all_checkpoint_keys": list(tensors)}))
    return folder, model


@pytest.mark.parametrize("method", METHODS)
def test_each_method_is_read_through_its_face(method: str, dense: Path, tmp_path: Path) -> None:
    folder, original = saved(dense, tmp_path / "saved", method)
    with lowbit.compat.install(children=False):
        from neural_compressor.transformers import AutoModelForCausalLM  # type: ignore[import-not-found]

        model = AutoModelForCausalLM.from_pretrained(str(folder), torch_dtype=torch.float32)
    kinds = {row.format for row in lowbit.explain(model).rows}
    assert {kind.partition("_")[0] for kind in kinds} == {"int4"} and len(lowbit.explain(model).rows) == 14
    torch.testing.assert_close(logits(in_fp32(model)), logits(original), atol=1e-4, rtol=1e-4)
    assert model.quantization_config.quant_method.value == method and model.quantization_config.group_size == 32
    model.save_pretrained(tmp_path / "ours")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32)
    torch.testing.assert_close(logits(in_fp32(again)), logits(original), atol=1e-4, rtol=1e-4)


def test_eight_bits_and_lowbits_own_class(dense: Path, tmp_path: Path) -> None:
    folder, original = saved(dense, tmp_path / "saved", "rtn", bits=8)
    model = lowbit.AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32)
    exact = lowbit.AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32, compute="fp32")
    torch.testing.assert_close(logits(exact), logits(original), atol=1e-4, rtol=1e-4)
    with pytest.warns(UserWarning, match="is low-bit already and is loaded as it is"):
        lowbit.AutoModelForCausalLM.from_pretrained(folder, load_in_low_bit="nf4")
    assert torch.equal(logits(lowbit.AutoModelForCausalLM.load_low_bit(folder)), logits(model))
    assert model.generate(torch.arange(3, 9)[None], max_new_tokens=3, do_sample=False).shape[1] <= 9


def test_the_layout_of_awq(dense: Path, tmp_path: Path) -> None:
    folder, original = saved(dense, tmp_path / "saved", "awq", backend="gemm")
    model = lowbit.AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32)
    torch.testing.assert_close(logits(in_fp32(model)), logits(original), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("said", "computed"), [("fp32", "auto"), ("bf16", "bf16"), ("int8", "int8")])
def test_what_the_folder_says_about_computing(said: str, computed: str, dense: Path, tmp_path: Path) -> None:
    folder, _ = saved(dense, tmp_path / "saved", "rtn", compute_dtype=said)
    model = lowbit.AutoModelForCausalLM.from_pretrained(folder)
    assert {weight.compute for weight in packed_weights(model).values()} == {computed}


def test_what_does_not_fit_is_refused(dense: Path, tmp_path: Path) -> None:
    folder, _ = saved(dense, tmp_path / "saved", "rtn")
    load = lowbit.AutoModelForCausalLM.from_pretrained
    file, config = folder / "model.safetensors", folder / "config.json"
    tensors, fields = load_file(file), json.loads(config.read_text())

    def refusal(changed: dict[str, torch.Tensor], words: str) -> None:
        save_file(changed, file, {"format": "pt"})
        with pytest.raises(LowbitError, match=words):
            load(folder)

    place = "model.layers.0.mlp.up_proj"
    refusal(tensors | {f"{place}.bias": torch.ones(192)}, "has a bias in .* and none in the model")
    refusal(tensors | {f"{place}.qweight": tensors[f"{place}.qweight"][:-1]}, "does not fit a linear")
    refusal({name: tensor for name, tensor in tensors.items() if name != f"{place}.scales"}, "lacks its scales")
    refusal(tensors | {"model.layers.9.mlp.up_proj.qweight": torch.zeros(2, 2)}, "of another model")
    refusal({name: tensor for name, tensor in tensors.items() if "qweight" not in name}, "packs nothing")
    save_file(tensors, file, {"format": "pt"})
    fields["quantization_config"]["group_size"] = 64
    config.write_text(json.dumps(fields))
    with pytest.raises(LowbitError, match="groups of 32 inputs, and group_size=64 was said"):
        load(folder)
    file.rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="was saved by Neural Compressor, and holds no safetensors"):
        load(folder)
