"""Folders of GPTQ, AWQ and AutoRound: loaded as they lie by the old names and by lowbit's own, with none of these programs."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file

import lowbit
import lowbit.compat
from interop.packed_linears import awq_linear, gptq_linear
from lowbit.errors import CheckpointError, RecipeError
from lowbit.layers import packed_weights
from lowbit.openvino import OVModelForCausalLM
from unit.checkpoint_cases import EVEN, logits, make
from unit.test_old_saves import in_fp32

pytestmark = pytest.mark.transformers
GROUP = 32
# What a configuration says, how its linears are packed, and the format that they have in lowbit.
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "gptq": ({"quant_method": "gptq", "desc_act": False, "sym": False}, {}, "int4_asym_g32"),
    "gptq, symmetric": ({"quant_method": "gptq", "sym": True}, {"symmetric": True}, "int4_g32"),
    "gptq, in order of importance": ({"quant_method": "gptq", "desc_act": True}, {"act_order": True}, "int4_asym_g32"),
    "gptq, second version": ({"quant_method": "gptq", "checkpoint_format": "gptq_v2"}, {"shift": 0}, "int4_asym_g32"),
    "gptq, zero points of the second under the name of the first": (
        {"quant_method": "gptq", "checkpoint_format": "gptq", "sym": True},
        {"symmetric": True, "shift": 0},
        "int4_g32",
    ),
    "gptq, 3 bits": ({"quant_method": "gptq", "bits": 3}, {"bits": 3}, "int3_asym_g32"),
    "gptq, 8 bits": ({"quant_method": "gptq", "bits": 8}, {"bits": 8}, "int8_asym_g32"),
    "autoround, as gptq": ({"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq"}, {}, "int4_asym_g32"),
    "autoround": ({"quant_method": "auto-round", "packing_format": "auto_round"}, {"shift": 0}, "int4_asym_g32"),
    "autoround, as awq": ({"quant_method": "auto-round", "packing_format": "auto_round:auto_awq"}, {}, "int4_asym_g32"),
    "awq": ({"quant_method": "awq", "version": "gemm", "zero_point": True}, {}, "int4_asym_g32"),
}  # fmt: skip


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("llama", tmp_path_factory.mktemp("packed") / "dense", **EVEN)


def write(dense: Path, folder: Path, fields: dict[str, Any], how: dict[str, Any], file: str = "config.json") -> Any:
    """A folder as one of these programs leaves it; returns the model with the numbers that its weights mean."""
    model = transformers.AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    tensors = dict(model.state_dict())
    is_awq = "awq" in json.dumps(fields) or "w_bit" in fields
    for path, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear) or path == "lm_head":
            continue
        weight = tensors.pop(f"{path}.weight")
        packed, meant = awq_linear(weight, GROUP) if is_awq else gptq_linear(weight, group=GROUP, **how)
        packed |= {} if is_awq else {"bias": torch.zeros(len(weight))}  # as AutoGPTQ wrote where there was none
        tensors |= {f"{path}.{part}": tensor.contiguous() for part, tensor in packed.items()}
        module.weight.data = meant
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((dense / name).read_bytes())
    save_file({name: one.clone() for name, one in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((dense / "config.json").read_text())
    if file == "config.json":
        config["quantization_config"] = {"bits": 4, "group_size": GROUP} | fields
    else:
        (folder / file).write_text(json.dumps(fields))
    (folder / "config.json").write_text(json.dumps(config))
    return model.eval()


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_is_loaded_as_it_lies(kind: str, dense: Path, tmp_path: Path) -> None:
    """As scripts of BigDL-LLM and ipex-llm say it; and without a word about bits."""
    fields, how, format = KINDS[kind]
    meant = write(dense, tmp_path / "packed", fields, how)
    with lowbit.compat.install(children=False), warnings.catch_warnings():
        warnings.simplefilter("error")
        from ipex_llm.transformers import AutoModelForCausalLM  # type: ignore[import-not-found]

        asked = {} if fields.get("bits", 4) != 4 else {"load_in_4bit": True, "optimize_model": True}
        model = AutoModelForCausalLM.from_pretrained(
            str(tmp_path / "packed"), torch_dtype=torch.float32, use_cache=True, **asked
        )
    assert {weight.format.name for weight in packed_weights(model).values()} == {format}
    assert type(model.lm_head) is torch.nn.Linear
    torch.testing.assert_close(logits(in_fp32(model)), logits(meant), atol=1e-4, rtol=1e-4)
    if asked:
        name = "sym_int4" if "asym" not in format else "asym_int4"
        assert model.config.bigdl_transformers_low_bit == name
    model.save_low_bit(str(tmp_path / "ours"))
    again = lowbit.AutoModelForCausalLM.load_low_bit(tmp_path / "ours", torch_dtype=torch.float32)
    torch.testing.assert_close(logits(in_fp32(again)), logits(meant), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("file", "fields"),
    [
        ("quantize_config.json", {"bits": 4, "group_size": GROUP, "desc_act": False, "sym": False}),
        ("quant_config.json", {"zero_point": True, "q_group_size": GROUP, "w_bit": 4, "version": "GEMM"}),
    ],
    ids=["AutoGPTQ", "AutoAWQ"],
)
def test_a_folder_that_says_it_in_a_file_beside(file: str, fields: dict[str, Any], dense: Path, tmp_path: Path) -> None:
    meant = write(dense, tmp_path / "packed", fields, {}, file)
    model = lowbit.AutoModelForCausalLM.from_pretrained(tmp_path / "packed", device_map={"": "cpu"}, compute="fp32")
    torch.testing.assert_close(logits(model), logits(meant), atol=1e-4, rtol=1e-4)
    model.save_pretrained(tmp_path / "ours")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    torch.testing.assert_close(logits(in_fp32(again)), logits(meant), atol=1e-4, rtol=1e-4)


def test_other_bits_than_the_folder_has_are_not_made(dense: Path, tmp_path: Path) -> None:
    write(dense, tmp_path / "packed", *KINDS["gptq"][:2])
    with pytest.warns(UserWarning, match="is low-bit already and is loaded as it is; the format asked for is ignored"):
        model = lowbit.AutoModelForCausalLM.from_pretrained(tmp_path / "packed", load_in_low_bit="sym_int8")
    assert {weight.format.bits for weight in packed_weights(model).values()} == {4}


def test_what_is_asked_of_a_folder_is_done_or_named(dense: Path, tmp_path: Path) -> None:
    """Four bits of another kind are not what the folder has; products and attention are as asked for all the same."""
    write(dense, tmp_path / "packed", *KINDS["gptq"][:2])
    with pytest.warns(UserWarning) as caught:
        model = lowbit.AutoModelForCausalLM.from_pretrained(
            tmp_path / "packed",
            load_in_low_bit="nf4",
            compute="fp32",
            attn_implementation="eager",
            use_cache=False,
            quantization_config=transformers.GPTQConfig(bits=4),
        )
    said = " ".join(str(one.message) for one in caught)
    assert "is loaded as it is; the format asked for is ignored" in said
    assert "where these change nothing: quantization_config" in said
    assert {weight.compute for weight in packed_weights(model).values()} == {"fp32"}
    assert model.config._attn_implementation == "eager" and model.config.use_cache is False


def test_other_bits_are_not_exported_from_it(dense: Path, tmp_path: Path) -> None:
    write(dense, tmp_path / "packed", *KINDS["gptq"][:2])
    for words in ({"load_in_8bit": True}, {"quantization_config": lowbit.RtnConfig()}):
        with pytest.raises(
            RecipeError, match="is low-bit already: make it low-bit anew from the original model, or leave"
        ):
            OVModelForCausalLM.from_pretrained(tmp_path / "packed", export=True, compile=False, **words)
    with pytest.warns(UserWarning, match="is read by lowbit itself, where these change nothing: torchscript"):
        OVModelForCausalLM.from_pretrained(tmp_path / "packed", export=True, compile=False, torchscript=True)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"quant_method": "awq", "version": "gemv"}, "AWQ in the layout 'gemv' is not read: the one called 'gemm' is"),
        ({"quant_method": "gptq", "checkpoint_format": "marlin"}, "prepared for one kernel .marlin. is not read"),
        ({"quant_method": "auto-round", "packing_format": "auto_round:mlx"}, "pack it as auto_round:auto_gptq"),
        ({"quant_method": "gptq", "group_size": 64}, "has groups of 32 inputs, and group_size=64 was said"),
    ],
)
def test_what_lies_otherwise_is_refused(fields: dict[str, Any], said: str, dense: Path, tmp_path: Path) -> None:
    write(dense, tmp_path / "packed", fields, {})
    with pytest.raises(lowbit.LowbitError, match=said):
        lowbit.AutoModelForCausalLM.from_pretrained(tmp_path / "packed")


def test_pickles_need_trust_and_another_model_is_told(dense: Path, tmp_path: Path) -> None:
    folder = tmp_path / "packed"
    meant = write(dense, folder, *KINDS["gptq"][:2])
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    with pytest.raises(CheckpointError, match=r"packs model\.layers\.1\..*it is of another model"):
        lowbit.AutoModelForCausalLM.from_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))
    from safetensors.torch import load_file

    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="pickles"):
        lowbit.AutoModelForCausalLM.from_pretrained(folder, load_in_4bit=True)
    model = lowbit.AutoModelForCausalLM.from_pretrained(folder, load_in_4bit=True, allow_pickle=True, compute="fp32")
    torch.testing.assert_close(logits(model), logits(meant), atol=1e-4, rtol=1e-4)


def test_llm_convert_takes_what_gptq_packed(dense: Path, tmp_path: Path) -> None:
    write(dense, tmp_path / "packed", *KINDS["gptq"][:2])
    with lowbit.compat.install(children=False):
        from ipex_llm import llm_convert  # type: ignore[import-not-found]

        path = llm_convert(str(tmp_path / "packed"), str(tmp_path / "out"), "llama", model_format="gptq")
    again = lowbit.AutoModelForCausalLM.load_low_bit(path)
    assert {weight.format.name for weight in packed_weights(again).values()} == {"int4_asym_g32"}
