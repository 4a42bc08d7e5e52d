"""State dicts of GPTQ and AWQ, put into a model that is there: codes as they are, order kept, other groups and models refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from interop.packed_linears import awq_linear, gptq_linear
from lowbit.checkpoint.ready_made import Packing, place_, read_folder, read_tensors
from lowbit.errors import CheckpointError, RecipeError
from lowbit.grid import unpack
from lowbit.interop.awq import read_awq
from lowbit.interop.gptq import read_gptq
from lowbit.kernels.table import CORE
from lowbit.layers import LowBitLinear
from lowbit_assets import tiny_model_in_memory

WEIGHT = torch.randn(48, 96, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("shift", [1, 0])
def test_a_linear_of_gptq_is_read_number_by_number(bits: int, act_order: bool, shift: int) -> None:
    tensors, meant = gptq_linear(WEIGHT[:32], bits, 32, act_order, shift=shift)
    packed = read_gptq("x", tensors, (32, 96), shift)
    assert packed.format.name == f"int{bits}_asym_g32" and (packed.order is not None) is act_order
    assert torch.allclose(unpack(packed), meant, atol=1e-6)
    x = torch.randn(5, 96)
    buffers = CORE.prepare(packed)
    assert torch.allclose(CORE.run(x, buffers, packed.format, packed.shape, "fp32"), x @ meant.t(), atol=1e-3)
    assert torch.equal(unpack(CORE.restore(buffers, packed.format, packed.shape)), unpack(packed))
    rows = CORE.rows(buffers, packed.format, packed.shape, torch.tensor([3, 0]))
    assert torch.allclose(rows, meant[[3, 0]], atol=1e-6)


def test_symmetric_and_whole_rows_are_seen() -> None:
    tensors, meant = gptq_linear(WEIGHT, 4, 32, symmetric=True)
    packed = read_gptq("x", tensors, (48, 96))
    assert (
        packed.format.name == "int4_g32" and packed.zeros is None and torch.allclose(unpack(packed), meant, atol=1e-6)
    )
    tensors, meant = gptq_linear(WEIGHT, 4, 96)
    packed = read_gptq("x", tensors, (48, 96))
    assert packed.format.name == "int4_asym_channel" and torch.allclose(unpack(packed), meant, atol=1e-6)


def test_a_linear_of_awq_is_read_number_by_number() -> None:
    tensors, meant = awq_linear(WEIGHT)
    packed = read_awq("x", tensors, (48, 96))
    assert packed.format.name == "int4_asym_g32" and torch.allclose(unpack(packed), meant, atol=1e-6)


def test_the_names_of_before_are_read() -> None:
    tensors, meant = gptq_linear(WEIGHT[:, :64], 4, 8, shift=0)
    old = {"packed_weight": tensors["qweight"].t(), "scale": tensors["scales"].t()}
    zeros = torch.stack([(tensors["qzeros"] >> (4 * i)) & 0xF for i in range(8)], -1).flatten(1).t()
    old["packed_zp"] = sum((zeros[:, i::8].long() << (4 * i)) for i in range(8)).to(torch.int32)  # type: ignore[attr-defined]
    packed = read_gptq("x", old, (48, 64))
    assert packed.format.name == "int4_asym_g8" and torch.allclose(unpack(packed), meant, atol=1e-6)


def quantised(model: Any, write: Any) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A state dict in which every linear but the head is packed, and what the packed ones mean."""
    state, meant = {}, {}
    for name, tensor in model.state_dict().items():
        module = model.get_submodule(name.rpartition(".")[0])
        if isinstance(module, nn.Linear) and name.endswith("proj.weight"):
            path = name.removesuffix(".weight")
            tensors, meant[path] = write(tensor)
            state |= {f"{path}.{part}": value for part, value in tensors.items()}
        else:
            state[name] = tensor + 0.01
    return state, meant


@pytest.mark.parametrize("write", [gptq_linear, awq_linear], ids=["gptq", "awq"])
def test_a_state_dict_is_put_into_a_model(write: Any, tmp_path: Path) -> None:
    source, model = tiny_model_in_memory("llama"), tiny_model_in_memory("llama", seed=1)
    state, meant = quantised(source, write)
    method = "gptq" if write is gptq_linear else "awq"
    config = {"quantization_config": {"quant_method": method, "bits": 4, "group_size": 32, "desc_act": False}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / "model.safetensors")
    tensors, found = read_folder(tmp_path)
    report = place_(model, tensors, Packing.of(found))
    assert {row.path for row in report.layers} == set(meant) and [row.path for row in report.skipped] == ["lm_head"]
    for path, weight in meant.items():
        layer = model.get_submodule(path)
        assert isinstance(layer, LowBitLinear) and torch.allclose(layer.weight, weight, atol=1e-6)
    assert torch.equal(model.model.norm.weight, source.model.norm.weight + 0.01)
    assert torch.equal(model.model.embed_tokens.weight, source.model.embed_tokens.weight + 0.01)


def test_other_groups_methods_and_models_are_refused() -> None:
    state, _ = quantised(tiny_model_in_memory("llama"), gptq_linear)
    with pytest.raises(
        RecipeError, match=r"q_proj: the checkpoint has groups of 32 inputs, and group_size=128 was said"
    ):
        place_(tiny_model_in_memory("llama"), state, Packing("gptq", 128))
    with pytest.raises(
        CheckpointError, match=r"packs model\.layers\.0\.self_attn\.q_proj, which this model does not have"
    ):
        place_(tiny_model_in_memory("gpt2"), state, Packing())
    with pytest.raises(CheckpointError, match=r"a qweight \[8, 160\] does not fit a linear \[96, 64\]"):
        place_(tiny_model_in_memory("llama", intermediate_size=96), state, Packing())
    with pytest.raises(CheckpointError, match="has no packed linear"):
        place_(tiny_model_in_memory("llama"), {"x.weight": torch.ones(1)}, Packing())
    with pytest.raises(CheckpointError, match="packed by 'spqr' is not read"):
        Packing.of({"quant_method": "spqr"})


class Odd:
    def __reduce__(self) -> Any:
        return (print, ("this must not be printed",))


def test_a_file_that_holds_more_than_tensors_is_refused_and_nothing_runs(tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "gptq_checkpoint.pt"
    torch.save({"x": Odd()}, file)
    with pytest.raises(CheckpointError, match="cannot be read as a state dict"):
        read_tensors(file)
    assert capsys.readouterr().out == ""
    torch.save({"x": [1, 2]}, file)
    with pytest.raises(CheckpointError, match="something else than tensors"):
        read_tensors(file)
