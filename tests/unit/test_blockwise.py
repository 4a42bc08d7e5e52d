"""Calibrated rounding of whole models, block by block."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

import lowbit
from lowbit.blockwise import Where
from lowbit.blockwise.inputs import collect, find_input_groups
from lowbit.blockwise.reading import let_go_, read_block_
from lowbit.calibration import Calibration
from lowbit.checkpoint.pages import Pages
from lowbit.errors import RecipeError
from lowbit.layers import LowBitExperts, LowBitLinear
from lowbit.models.capture import Call, beside_of_blocks, find_blocks, first_calls, next_calls, run_block, watch_block
from lowbit.options import GptqOptions
from lowbit.quantize import quantize_
from lowbit.recipe import Recipe, recipe_named
from lowbit.report import LayerReport
from lowbit_assets import tiny_model_in_memory
from unit.block_cases import with_an_idle_expert

IDS = torch.randint(3, 280, (8, 32), generator=torch.Generator().manual_seed(0))
HELD_OUT = torch.randint(3, 280, (4, 32), generator=torch.Generator().manual_seed(1))
CALIBRATION = Calibration(IDS)
# Enough that what was learnt holds for other tokens, in blocks of 160 inputs.
MANY = Calibration(torch.randint(3, 280, (64, 32), generator=torch.Generator().manual_seed(2)))
INT3 = recipe_named("int3_g32").replace(head=None)
GPTQ = INT3.replace(rounder="gptq")
FAMILIES = ["llama", "gpt2", "gemma3", "smollm3", "qwen2_moe", "mixtral", "mpt"]


def logits_of(model: nn.Module, ids: torch.Tensor = HELD_OUT) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


def distance(family: str, recipe: Recipe, calibration: Calibration | None = None) -> float:
    """How far a model's logits are moved by rounding its weights."""
    model = tiny_model_in_memory(family)
    expected = logits_of(model)
    quantize_(model, recipe, calibration=calibration)
    return float((logits_of(model) - expected).norm() / expected.norm())


# --- capture ---------------------------------------------------------------------------------------------------------


@pytest.mark.transformers
@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_one_by_one_compute_what_the_model_does(family: str) -> None:
    model = tiny_model_in_memory(family)
    blocks = find_blocks(model)
    assert len(blocks) == model.config.num_hidden_layers
    batches = CALIBRATION.batches(4)
    calls = first_calls(model, batches, blocks)
    common = [call.beside() for call in calls]
    for name, own in zip(blocks, beside_of_blocks(model, blocks, batches), strict=True):
        calls = [call.with_beside(c | own) for call, c in zip(calls, common, strict=True)]
        calls = next_calls(calls, [run_block(model.get_submodule(name), call) for call in calls])
    hidden = []
    hook = model.get_submodule(blocks[-1]).register_forward_hook(lambda m, a, output: hidden.append(output))
    for batch in batches:
        logits_of(model, batch)
    hook.remove()
    for call, expected in zip(calls, hidden, strict=True):
        assert torch.equal(call.hidden, expected[0] if isinstance(expected, tuple) else expected)


class Mixer(nn.Module):
    """A block without transformers that returns its state second-hand, in a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(64, 96), nn.Linear(96, 64)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        return x + self.outer(torch.relu(self.inner(x))), None


class Plain(nn.Module):
    def __init__(self, shared: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(288, 64)
        self.blocks = nn.ModuleList(Mixer() for _ in range(3))
        if shared:
            self.blocks[2].inner.weight = self.blocks[0].inner.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.table(ids)
        for block in self.blocks:
            x = block(x)[0]
        return x


def test_blocks_of_any_module_may_return_tuples() -> None:
    model = Plain()
    assert find_blocks(model) == ["blocks.0", "blocks.1", "blocks.2"]
    expected = model(HELD_OUT)
    report = quantize_(model, GPTQ, calibration=CALIBRATION)
    assert len(report.layers) == 6 and isinstance(model.blocks[1].outer, LowBitLinear)
    assert float((model(HELD_OUT) - expected).detach().norm() / expected.detach().norm()) < 0.2


def test_models_without_blocks_are_told() -> None:
    model = nn.Sequential(nn.Embedding(288, 64), nn.Linear(64, 64))
    with pytest.raises(RecipeError, match="no blocks were found in this Sequential"):
        quantize_(model, GPTQ, calibration=CALIBRATION)


def test_linears_with_one_input_are_found() -> None:
    model = tiny_model_in_memory("llama")
    block = model.model.layers[0]
    paths = [name for name, module in block.named_modules() if isinstance(module, nn.Linear)]
    groups = find_input_groups(block, first_calls(model, [IDS])[0], paths)
    names = [[path.rpartition(".")[2] for path in group] for group in groups.paths]
    assert names == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
    assert groups.visits == dict.fromkeys(paths, 1)


def test_a_pass_ends_where_it_has_seen_what_it_is_made_for() -> None:
    model = tiny_model_in_memory("llama")
    block, call = model.model.layers[0], first_calls(model, [IDS])[0]
    computed: list[str] = []
    for name, module in block.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda m, a, o, name=name: computed.append(name.rpartition(".")[2]))
    whole = watch_block(block, call, {block.self_attn.o_proj: 0})
    assert len(computed) == 7 and whole.output is not None
    computed.clear()
    seen = watch_block(block, call, {block.self_attn.o_proj: 1})
    assert computed == ["q_proj", "k_proj", "v_proj"] and seen.output is None
    ((args, _),), ((expected, _),) = (one.given[block.self_attn.o_proj] for one in (seen, whole))
    assert torch.equal(args[0], expected[0])
    computed.clear()
    collect(block, [call, call], {"mlp.gate_proj": 64}, {"mlp.gate_proj": 1}, hessian=True)
    assert sorted(set(computed)) == ["k_proj", "o_proj", "q_proj", "v_proj"] and len(computed) == 8


def test_what_linears_get_in_full_precision_takes_one_pass() -> None:
    model = tiny_model_in_memory("llama")
    runs: list[str] = []
    for name in ("q_proj", "o_proj"):
        module = model.model.layers[0].self_attn.get_submodule(name)
        module.register_forward_hook(lambda m, a, o, name=name: runs.append(name))
    quantize_(model, GPTQ, calibration=CALIBRATION)
    # What finds the blocks, what stands beside them, and the groups of a block: five. Then one pass in full precision, and
    # those for o, gate and up, down, and the next block; o is passed by the last three of them.
    assert runs.count("q_proj") - runs.count("o_proj") == 1
    assert runs.count("q_proj") <= 5 + 1 + 4


# --- quality ---------------------------------------------------------------------------------------------------------


class Twice(nn.Module):
    """Its first linear runs twice, its last one for some inputs only."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = (nn.Linear(8, 8, bias=False) for _ in range(3))
        self.calls = 0

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = self.second(self.first(self.first(hidden)).relu())
        self.calls += 1
        return self.last(hidden) if float(hidden.detach().sum()) > 0 else hidden


def test_a_block_is_left_once_its_inputs_are_seen() -> None:
    torch.manual_seed(0)
    block = Twice()
    block.second.weight.data.abs_()  # what comes out is positive unless the input is nothing
    inputs = [torch.zeros(4, 8), *torch.randn(3, 4, 8)]
    calls = [Call((x,), {}) for x in inputs]
    with torch.no_grad():
        halves = [block.first(x) for x in inputs]
        rows = {
            "first": torch.cat([*inputs, *halves]),
            "second": torch.cat([block.first(half).relu() for half in halves]),
        }
        rows["last"] = block.second(rows["second"])[4:]
    for wanted, run in ((["first"], 0), (["second", "first"], 0), (["last"], 4), (["last", "first"], 4)):
        visits = find_input_groups(block, calls[0], wanted).visits
        block.calls = 0
        found = collect(block, calls, dict.fromkeys(wanted, 8), visits, hessian=True)
        assert block.calls == run, wanted  # no call runs whole; all do where the first left a linear out
        for path in wanted:
            assert found[path].tokens == len(rows[path])
            expected = 2 / len(rows[path]) * rows[path].t() @ rows[path]
            assert torch.allclose(found[path].hessian, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_gptq_and_importance_beat_plain_rounding(family: str) -> None:
    plain = distance(family, INT3.replace(rounder="plain_rtn"))
    assert distance(family, GPTQ, MANY) < 0.9 * plain
    assert distance(family, INT3, MANY) < 1.02 * plain


def test_error_of_a_block_is_below_that_of_plain_rounding() -> None:
    """Inputs of a language model differ in size; then importance alone is a clear gain, and GPTQ a larger one."""
    model = tiny_model_in_memory("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                norm.weight.mul_(torch.randn(64, generator=torch.Generator().manual_seed(3)).mul(1.5).exp())
    call = first_calls(model, [HELD_OUT])[0]
    expected = run_block(model.model.layers[0], call)
    errors = {}
    for name, recipe in {"plain": INT3.replace(rounder="plain_rtn"), "rtn": INT3, "gptq": GPTQ}.items():
        rounded = copy.deepcopy(model)
        quantize_(rounded, recipe, calibration=None if name == "plain" else MANY)
        errors[name] = float((run_block(rounded.model.layers[0], call) - expected).square().mean())
    assert errors["rtn"] < 0.8 * errors["plain"]
    assert errors["gptq"] < 0.8 * errors["plain"]


@pytest.mark.parametrize(
    "options", [GptqOptions(true_sequential=False), GptqOptions(correction=0.0), GptqOptions(order="none")]
)
def test_options_reach_the_blocks(options: GptqOptions) -> None:
    models = [tiny_model_in_memory("llama") for _ in range(3)]
    expected = logits_of(models[0])
    quantize_(models[0], GPTQ.replace(rounder_options=options), calibration=MANY)
    quantize_(models[1], GPTQ, calibration=MANY)
    quantize_(models[2], INT3.replace(rounder="plain_rtn"))
    assert not torch.equal(logits_of(models[0]), logits_of(models[1]))
    assert float((logits_of(models[0]) - expected).norm()) < 0.9 * float((logits_of(models[2]) - expected).norm())


# --- saving and going on ---------------------------------------------------------------------------------------------


@pytest.mark.transformers
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_saved_and_loaded_it_is_the_same(family: str, tmp_path: Path) -> None:
    model = tiny_model_in_memory(family)
    lowbit.optimize_model(model, None, recipe=GPTQ, calibration=CALIBRATION)
    model.save_low_bit(tmp_path / "small")
    loaded = lowbit.AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert torch.equal(logits_of(loaded), logits_of(model))
    assert loaded.lowbit_recipe == GPTQ
    assert [row.note for row in loaded.lowbit_report.layers] == [row.note for row in model.lowbit_report.layers]


@pytest.mark.transformers
def test_blocks_are_read_from_a_folder_when_it_is_their_turn(tmp_path: Path) -> None:
    """What is loaded is mapped, a block gets numbers of its own, and those that are packed are let go; the result is the same."""
    model = tiny_model_in_memory("llama")
    model.save_pretrained(tmp_path / "dense")
    file = tmp_path / "dense" / "model.safetensors"
    pages = Pages([str(file)])
    dense = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()
    first, second = dense.model.layers
    expected = {name: parameter.clone() for name, parameter in dense.named_parameters()}
    assert all(map(pages.holds, dense.parameters()))
    read = read_block_(first, pages)
    assert not any(map(pages.holds, read)) and all(map(pages.holds, second.parameters()))
    assert all(torch.equal(parameter, expected[name]) for name, parameter in dense.named_parameters())
    linear = first.mlp.up_proj
    first.mlp.up_proj = nn.Identity()
    let_go_(read, first, pages)
    assert linear.weight.numel() == 0 and first.mlp.gate_proj.weight.numel()
    loaded = lowbit.AutoModelForCausalLM.from_pretrained(tmp_path / "dense", recipe=GPTQ, calibration=IDS)
    lowbit.optimize_model(model, None, recipe=GPTQ, calibration=IDS)
    assert torch.equal(logits_of(loaded), logits_of(model))


def test_activations_may_lie_on_disk(tmp_path: Path) -> None:
    models = [tiny_model_in_memory("llama").to(torch.bfloat16) for _ in range(2)]
    quantize_(models[0], GPTQ, calibration=CALIBRATION)
    quantize_(models[1], GPTQ, calibration=CALIBRATION, where=Where(spill=tmp_path))
    assert torch.equal(logits_of(models[0]), logits_of(models[1]))
    assert not list(tmp_path.iterdir())


# --- what may go wrong -----------------------------------------------------------------------------------------------


def test_experts_without_tokens_are_rounded_and_named() -> None:
    model = with_an_idle_expert()
    sent: list[torch.Tensor] = []
    model.model.layers[0].mlp.experts.register_forward_pre_hook(lambda m, a: sent.append(a[1]))
    few = Calibration(IDS[:1, :2])
    report = quantize_(model, GPTQ, calibration=few)
    assert isinstance(model.model.layers[0].mlp.experts, LowBitExperts)
    unseen = set(range(4)) - set(sent[-1].flatten().tolist())
    rows = {row.path: row for row in report.layers}
    note = rows["model.layers.0.mlp.experts.gate_up_proj"].note
    assert unseen and all(str(index) in note for index in unseen) and "saw 0 of 2 calibration tokens" in note


def test_inputs_of_zeros_are_reported() -> None:
    model = tiny_model_in_memory("llama")
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight.zero_()
    report = quantize_(model, GPTQ, calibration=CALIBRATION)
    notes = {row.path: row.note for row in report.layers}
    assert "nothing but zeros" in notes["model.layers.0.self_attn.q_proj"]
    assert notes["model.layers.1.self_attn.q_proj"] == ""
    assert bool(torch.isfinite(logits_of(model)).all())


def test_tied_weights_are_rounded_once() -> None:
    model = Plain(shared=True)
    report = quantize_(model, GPTQ, calibration=CALIBRATION)
    assert model.blocks[2].inner.packed_weight is model.blocks[0].inner.packed_weight
    notes = {row.path: row.note for row in report.layers}
    assert "rounded to nearest" in notes["blocks.0.inner"] and notes["blocks.0.outer"] == ""
    tied = tiny_model_in_memory("llama", tie_word_embeddings=True)
    quantize_(tied, recipe_named("int4").replace(rounder="gptq"), calibration=CALIBRATION)
    assert tied.lm_head.packed_weight is tied.model.embed_tokens.packed_weight


def test_widths_that_no_group_divides() -> None:
    for name in ("int4_g64", "int4_g128", "int4_g100"):
        models = [tiny_model_in_memory("llama", awkward=True) for _ in range(3)]
        recipe = recipe_named(name).replace(head=None)
        quantize_(models[0], recipe.replace(rounder="gptq"), calibration=MANY)
        quantize_(models[1], recipe.replace(rounder="plain_rtn"))
        ours, plain, expected = map(logits_of, models)
        assert float((ours - expected).norm()) < 0.95 * float((plain - expected).norm())


def test_data_that_is_missing_or_useless_is_told() -> None:
    with pytest.raises(RecipeError, match="gptq looks at activations and needs calibration tokens"):
        quantize_(tiny_model_in_memory("llama"), GPTQ)
    with pytest.raises(RecipeError, match="plain_rtn looks at no activations"):
        quantize_(tiny_model_in_memory("llama"), INT3.replace(rounder="plain_rtn"), calibration=CALIBRATION)
    with pytest.raises(RecipeError, match="go up to 500 and the model knows 288"):
        quantize_(tiny_model_in_memory("llama"), GPTQ, calibration=Calibration(torch.full((1, 8), 500)))


@pytest.mark.transformers
def test_loading_calibrates_what_was_loaded(tmp_path: Path) -> None:
    model = tiny_model_in_memory("llama")
    model.save_pretrained(tmp_path / "dense")
    load = lowbit.AutoModelForCausalLM.from_pretrained
    found = load(tmp_path / "dense", recipe=GPTQ, calibration=CALIBRATION)
    assert torch.equal(logits_of(found), logits_of(lowbit.optimize_model(model, recipe=GPTQ, calibration=CALIBRATION)))
    with pytest.raises(RecipeError, match="gptq looks at activations and needs calibration tokens"):
        load(tmp_path / "dense", recipe=GPTQ)


def test_report_has_a_line_for_every_linear() -> None:
    model = transformers.AutoModelForCausalLM.from_config(tiny_model_in_memory("gemma2").config).eval()
    report = quantize_(model, GPTQ.replace(skip=("k_proj",)), calibration=CALIBRATION)
    rows: list[LayerReport] = report.layers
    assert [r.path for r in rows] == [n for n, m in model.named_modules() if isinstance(m, LowBitLinear)]
    assert any("k_proj" in row.path and "modules_to_not_convert" in row.reason for row in report.skipped)
