"""The code blocks of guide 3, `ipex.llm.optimize`, each as its users write it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from interop.packed_linears import gptq_linear
from lowbit_assets import reference_model, text
from seeds.running import run_seed

PROMPT = "The capital of France is"
# What is quantised by that library's own configurations keeps its names.
_IPEX = "intel_extension_for_pytorch"
_OWN = {f"{_IPEX}.llm.optimize": "quantization_config="}
IN_STAGES = _OWN | {
    f"{_IPEX}.quantization.get_smooth_quant_qconfig_mapping": "no name of its own",
    f"{_IPEX}.quantization.prepare": "no name of its own",
}
ALONE = _OWN | {
    f"{_IPEX}.quantization.{name}": "no name of its own"
    for name in ("get_weight_only_quant_qconfig_mapping", "WoqWeightDtype", "WoqLowpMode")
}
pytestmark = [pytest.mark.slow, pytest.mark.transformers]


@pytest.fixture(scope="module")
def model() -> Path:
    return reference_model("plain")


def test_fp32_and_bf16(model: Path, tmp_path: Path) -> None:
    """And fp16, which the guide does not write and `optimize` takes."""
    for dtype, shown in (("float", "torch.float32"), ("bfloat16", "torch.bfloat16"), ("float16", "torch.float16")):
        for ran in run_seed("guide3/fp32_bf16.py", tmp_path, model, dtype, rewritten=dtype == "bfloat16"):
            kind, answer = ran.lines[0], "\n".join(ran.lines[1:])
            assert kind == shown and answer.startswith(f"{PROMPT} Paris")


def test_smoothquant_in_two_stages(model: Path, tmp_path: Path) -> None:
    place = tmp_path / "text.txt"
    place.write_text(text("sqlite_valid")[:6000])
    for ran in run_seed("guide3/smoothquant.py", tmp_path, model, place, left=IN_STAGES):
        assert ran.out.startswith(f"{PROMPT} Paris")
        assert float(ran.lines[-2]) < 0.03
        # A byte for each weight, and products of bytes: exact ones are further away than 8 bits for the inputs allow.
        assert ran.lines[-1] == "w8a8 core 1.0 whole: True exact: False"
        summary = json.loads((ran.folder / "qconfig.json").read_text())
        assert "model.layers.29.mlp" in summary
        operation = summary["model.layers.0.self_attn"]["q_op_infos"]["0"]
        assert operation["fqn"] == "model.layers.0.self_attn.q_proj"
        assert operation["weight_tensor_infos"][0]["inf_dtype"] == "torch.qint8"


# Types of weights, lowp modes, groups, what is printed of a layer, and the most that may be lost. The block says no group size,
# which is -1: whole rows, of which 4 bits lose much in a model of this size, in any library; so the fours have groups as well.
WAYS = [
    ("INT8", "NONE", -1, "torch.int8 int8_asym_channel fp32", 0.05),
    ("INT8", "INT8", -1, "torch.int8 int8_channel int8", 0.1),
    ("INT8", "BF16", 128, "torch.int8 int8_asym_g128 bf16", 0.05),
    ("INT4", "NONE", -1, "torch.uint8 int4_asym_channel fp32", 1.5),
    ("NF4", "NONE", -1, "torch.uint8 nf4_channel fp32", 1.5),
    ("INT4", "BF16", 64, "torch.uint8 int4_asym bf16", 0.5),
    ("INT4", "INT8", 64, "torch.uint8 int4_asym int8", 0.5),
    ("NF4", "FP16", 64, "torch.uint8 nf4 fp16", 0.5),
]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join(map(str, way[:3])))
def test_weights_alone(way: tuple[str, str, int, str, float], model: Path, tmp_path: Path) -> None:
    kind, mode, group, shown, limit = way
    anew = way is WAYS[-1]
    for ran in run_seed("guide3/weight_only.py", tmp_path, model, kind, mode, group, left=ALONE, rewritten=anew):
        assert ran.out.startswith(PROMPT) and len(ran.out.splitlines()[0]) > len(PROMPT)
        assert float(ran.lines[-3]) < limit
        assert ran.lines[-2] == f"WeightOnlyQuantizedLinear {shown}"
        assert float(ran.lines[-1]) < (8.3 if kind == "INT8" else 5.5)


def test_a_checkpoint_that_gptq_made(model: Path, tmp_path: Path) -> None:
    """The block's `low_precision_checkpoint`, a state dict in a file of torch."""
    state = {}
    for name, tensor in load_file(model / "model.safetensors").items():
        if name.endswith("layers.0.mlp.up_proj.weight"):
            tensors, _ = gptq_linear(tensor.float(), group=64)
            state |= {f"{name.removesuffix('.weight')}.{part}": value.contiguous() for part, value in tensors.items()}
    place = tmp_path / "gptq_checkpoint.pt"
    torch.save(state, place)
    for ran in run_seed("guide3/weight_only.py", tmp_path, model, "INT4", "BF16", 64, place, left=ALONE):
        assert ran.out.startswith(f"{PROMPT} Paris")
        assert ran.lines[-2] == "WeightOnlyQuantizedLinear torch.uint8 int4_asym bf16"


def test_several_devices_are_refused_by_name(tmp_path: Path) -> None:
    left = {
        "intel_extension_for_pytorch.deepspeed": "lowbit on several devices",
        "intel_extension_for_pytorch.distributed.init": "use lowbit on several devices",
    }
    for ran in run_seed("guide3/deepspeed.py", tmp_path, left=left):
        assert len(ran.lines) == 2 and all("several devices" in line for line in ran.lines)
