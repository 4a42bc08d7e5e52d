"""What a calibrated run holds and computes: one block at a time, one Hessian for each input, nearest rounding where it must."""

from __future__ import annotations

import gc
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from lowbit.algorithms.gptq import round_gptq
from lowbit.algorithms.rtn import round_weight
from lowbit.algorithms.statistics import Statistics
from lowbit.blockwise import Where, inputs
from lowbit.calibration import Calibration
from lowbit.checkpoint.pages import Pages
from lowbit.formats import as_format
from lowbit.grid import unpack
from lowbit.layers import packed_weights
from lowbit.models.capture import first_calls
from lowbit.options import AutoRoundOptions, AwqOptions, GptqOptions
from lowbit.quantize import quantize_
from lowbit.recipe import Recipe, recipe_named
from lowbit_assets import tiny_model_in_memory

IDS = torch.randint(3, 280, (8, 32), generator=torch.Generator().manual_seed(0))
CALIBRATION = Calibration(IDS)
INT3 = recipe_named("int3_g32").replace(head=None)
GPTQ = INT3.replace(rounder="gptq")


class Watched(Pages):
    """The files of a model, and what is in memory beside them each time that a block was read."""

    def __init__(self, file: Path) -> None:
        super().__init__([str(file)])
        self.model: nn.Module = nn.Module()
        self.dense: list[int] = []
        self.states: list[int] = []

    def release(self) -> None:
        super().release()
        own = [p for p in self.model.parameters() if not self.holds(p)]
        self.dense.append(sum(p.nbytes for p in own))
        found = [t for t in gc.get_objects() if type(t) is torch.Tensor and t.dim() == 3 and t.shape[1:] == (32, 64)]
        self.states.append(sum(t.nbytes for t in found))


@pytest.mark.transformers
@pytest.mark.parametrize(
    "recipe", [GPTQ, INT3.replace(scaler="awq", scaler_options=AwqOptions(steps=2))], ids=["gptq", "awq"]
)
def test_one_block_is_in_memory_at_a_time(recipe: Recipe, tmp_path: Path) -> None:
    """Of six blocks, dense weights of their own has one, and hidden states do not gather."""
    tiny_model_in_memory("llama", num_hidden_layers=6).save_pretrained(tmp_path / "dense")
    pages = Watched(tmp_path / "dense" / "model.safetensors")
    pages.model = model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()
    block = sum(parameter.nbytes for parameter in model.model.layers[0].parameters())
    norms = sum(p.nbytes for name, p in model.named_parameters() if "norm" in name)
    report = quantize_(model, recipe, calibration=CALIBRATION, where=Where(source=pages))
    assert len(report.layers) == 6 * 7
    assert max(pages.dense) >= block and max(pages.dense) <= block + norms
    assert len(pages.states) >= 7 and 0 < max(pages.states[3:]) <= max(pages.states[:3])


def states_in_memory(spilled: Path) -> int:
    """The bytes of hidden states of a batch, of those made since `gc.freeze`, that are not mapped from files."""
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if str(spilled) in line]
    mapped = [tuple(int(end, 16) for end in words[0].split("-")) for words in lines]
    states = [t for t in gc.get_objects() if type(t) is torch.Tensor and t.shape == (8, 32, 64)]
    return sum(t.nbytes for t in states if not any(low <= t.data_ptr() < high for low, high in mapped))


@pytest.mark.skipif(sys.platform != "linux", reason="what is mapped is read from /proc")
def test_spilled_activations_are_in_files_and_not_in_memory(tmp_path: Path) -> None:
    """Eight batches: without spilling each step holds a state for every one of them, with it for the one that is run."""
    many = Calibration(torch.randint(3, 280, (64, 32), generator=torch.Generator().manual_seed(2)))
    found: dict[str, int] = {}
    logits = []
    for name, where in {"memory": Where(), "files": Where(spill=tmp_path / "spilled")}.items():
        model, held = tiny_model_in_memory("llama"), []
        hook = model.model.layers[1].input_layernorm.register_forward_hook(
            lambda *_, held=held: held.append(states_in_memory(tmp_path / "spilled"))
        )
        gc.collect()
        gc.freeze()
        quantize_(model, GPTQ, calibration=many, where=where)
        gc.unfreeze()
        hook.remove()
        found[name] = max(held[-8:])  # the last pass over all batches
        with torch.no_grad():
            logits.append(model(IDS).logits)
    assert torch.equal(*logits)
    state = 8 * 32 * 64 * 4
    assert found["memory"] >= 8 * state and found["files"] <= 3 * state
    assert not list((tmp_path / "spilled").iterdir())


def test_a_scale_is_tried_on_spilled_activations_as_on_others(tmp_path: Path) -> None:
    recipe = GPTQ.replace(scaler="awq", scaler_options=AwqOptions(steps=2))
    logits = []
    for where in (Where(), Where(spill=tmp_path)):
        model = tiny_model_in_memory("llama")
        quantize_(model, recipe, calibration=CALIBRATION, where=where)
        with torch.no_grad():
            logits.append(model(IDS).logits)
    assert torch.equal(*logits) and not list(tmp_path.iterdir())


def test_linears_with_one_input_share_a_hessian(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    class Counted(Statistics):
        def __init__(self, width: int, *rest: Any, **named: Any) -> None:
            made.append(width)
            super().__init__(width, *rest, **named)

    monkeypatch.setattr(inputs, "Statistics", Counted)
    model = tiny_model_in_memory("llama")
    report = quantize_(model, GPTQ, calibration=CALIBRATION)
    wide = model.config.intermediate_size
    # Query, key and value; the output; gate and up; down: four for seven linears, in each of two blocks.
    assert len(report.layers) == 14 and made == [64, 64, 64, wide] * 2


def test_true_sequential_shows_each_linear_what_rounded_ones_before_it_give() -> None:
    """Without it all of a block are rounded on what the block in full precision shows them."""
    codes: dict[bool, dict[str, torch.Tensor]] = {}
    paths = ["q_proj", "k_proj", "v_proj", "o_proj"]
    for sequential in (True, False):
        options = GptqOptions(true_sequential=sequential, correction=0.0)
        model = tiny_model_in_memory("llama")
        quantize_(model, GPTQ.replace(rounder_options=options), calibration=CALIBRATION)
        held = packed_weights(model)
        packs = {path: held[f"model.layers.0.self_attn.{path}.packed_weight"].packed() for path in paths}
        # The same by hand: what the output projection gets, behind the three as they are, or as they were rounded.
        dense = tiny_model_in_memory("llama")
        block = dense.model.layers[0]
        if sequential:
            with torch.no_grad():
                for path in paths[:3]:
                    block.self_attn.get_submodule(path).weight.copy_(unpack(packs[path]))
        calls = first_calls(dense, CALIBRATION.batches())
        found = inputs.collect(block, calls, {"self_attn.o_proj": 64}, {"self_attn.o_proj": 1}, hessian=True)
        weight, seen = block.self_attn.o_proj.weight.detach(), found["self_attn.o_proj"]
        assert torch.equal(round_gptq(weight, as_format("int3_g32"), seen, options).packed.codes, packs["o_proj"].codes)
        codes[sequential] = {path: packed.codes for path, packed in packs.items()}
    same = [torch.equal(codes[True][path], codes[False][path]) for path in paths]
    assert same == [True, True, True, False]


class Rare(nn.Module):
    """A linear for every token, and one for tokens that are seldom."""

    def __init__(self) -> None:
        super().__init__()
        self.usual, self.seldom = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        chosen = x[..., 0] > 50
        out = x + 0.1 * self.usual(x)
        if bool(chosen.any()):
            out = out.index_put((chosen,), out[chosen] + self.seldom(x[chosen]))
        return out


class Routed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(288, 64)
        with torch.no_grad():
            self.table.weight[7, 0] = 100.0
        self.blocks = nn.ModuleList(Rare() for _ in range(2))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.table(ids)
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize(("least_share", "nearest"), [(0.1, True), (0.001, False)])
def test_a_linear_that_saw_too_few_tokens_is_rounded_to_nearest_and_says_so(least_share: float, nearest: bool) -> None:
    ids = IDS.clone()
    ids[ids == 7] = 8
    ids[0, :5] = 7
    model = Routed()
    weight = model.blocks[0].seldom.weight.detach().clone()
    recipe = GPTQ.replace(rounder_options=GptqOptions(least_share=least_share))
    notes = {row.path: row.note for row in quantize_(model, recipe, calibration=Calibration(ids)).layers}
    assert ("rounded to nearest: it saw 5 of 256 calibration tokens" in notes["blocks.0.seldom"]) is nearest
    assert "rounded to nearest" not in notes["blocks.0.usual"]
    packed = packed_weights(model)["blocks.0.seldom.packed_weight"].packed()
    assert torch.equal(unpack(packed), unpack(round_weight(weight, as_format("int3_g32")))) is nearest


def test_what_no_scale_could_be_folded_into_is_reported() -> None:
    """GPT-2's last linear stands behind a GELU, which is not linear."""
    recipe = INT3.replace(scaler="awq", scaler_options=AwqOptions(steps=2))
    report = quantize_(tiny_model_in_memory("gpt2"), recipe, calibration=CALIBRATION)
    notes = {row.path: row.note for row in report.layers}
    for path, note in notes.items():
        if path.endswith("mlp.c_proj"):
            assert "awq: not scaled" in note and "not linear" in note
        else:
            assert "not scaled" not in note and "awq" in note
    assert sum(path.endswith("mlp.c_proj") for path in notes) == 2


def test_autoround_tunes_on_what_rounded_blocks_give_where_it_is_asked_to() -> None:
    """The first block gets the same either way; the second differs."""
    codes = []
    for chained in (True, False):
        model = tiny_model_in_memory("llama")
        options = AutoRoundOptions(iterations=8, enable_quanted_input=chained)
        quantize_(model, INT3.replace(rounder="autoround", rounder_options=options), calibration=CALIBRATION)
        held = {name: weight.packed().codes for name, weight in packed_weights(model).items()}
        codes.append(held)
    same = {name: torch.equal(codes[0][name], codes[1][name]) for name in codes[0]}
    assert all(same[name] for name in same if "layers.0" in name)
    assert not any(same[name] for name in same if "layers.1.mlp" in name)
