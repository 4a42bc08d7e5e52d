"""The allocation of formats to a budget: the best of all choices, and sensitivities that foretell the damage."""

from __future__ import annotations

import itertools
import json
import math
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit.algorithms.sensitivity import allocate_formats, expected_divergence, linear_weights, measure_moments
from lowbit.allocate import OFFERED_BITS, allocate, byte_budget, stored_bytes
from lowbit.calibration import Calibration
from lowbit.cli import FAILED, OK, main
from lowbit.errors import RecipeError
from lowbit.evaluate import divergence
from lowbit.formats import as_format
from lowbit.grid import PLAIN, quantize, unpack
from lowbit.quantize import allocate_bits, quantize_
from lowbit.recipe import Recipe
from lowbit_assets import tiny_model, tiny_model_in_memory
from unit.block_cases import with_an_idle_expert

OPTION = st.tuples(st.integers(1, 30), st.floats(0, 10, allow_nan=False))
WEIGHTS = st.lists(st.lists(OPTION, min_size=1, max_size=4), min_size=1, max_size=5)


@settings(max_examples=100)
@given(weights=WEIGHTS, share=st.floats(0, 1))
def test_the_allocation_is_the_best_of_all(weights: list[list[tuple[int, float]]], share: float) -> None:
    sizes = {str(i): {j: size for j, (size, _) in enumerate(row)} for i, row in enumerate(weights)}
    errors = {str(i): {j: error for j, (_, error) in enumerate(row)} for i, row in enumerate(weights)}
    least = sum(min(row.values()) for row in sizes.values())
    most = sum(max(row.values()) for row in sizes.values())
    budget = least + int(share * (most - least))
    chosen = allocate(sizes, errors, budget)
    assert sum(sizes[path][option] for path, option in chosen.items()) <= budget
    found = sum(errors[path][option] for path, option in chosen.items())
    best = min(
        sum(error for _, error in choice)
        for choice in itertools.product(*weights)
        if sum(size for size, _ in choice) <= budget
    )
    assert found == pytest.approx(best, rel=1e-7, abs=1e-7)


def test_a_budget_below_the_smallest_formats_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"too small: .* need 7"):
        allocate({"a": {2: 3}, "b": {2: 4, 3: 6}}, {"a": {2: 1.0}, "b": {2: 1.0, 3: 0.5}}, 6)


def test_sizes_and_errors_must_be_of_the_same_formats() -> None:
    with pytest.raises(RecipeError, match="a: an allocation needs"):
        allocate({"a": {2: 3, 3: 4}}, {"a": {2: 1.0}}, 6)
    with pytest.raises(RecipeError, match="a: its error at 2 is not a finite number"):
        allocate({"a": {2: 3}}, {"a": {2: float("nan")}}, 6)


@pytest.mark.parametrize(
    "name", ["int2", "int3_g32", "int5_asym", "int4_channel", "int4_dq", "int8_tensor", "q4_k", "nvfp4"]
)
@pytest.mark.parametrize("shape", [(16, 256), (7, 100)])
def test_the_bytes_of_a_weight_are_those_it_is_stored_in(name: str, shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    assert stored_bytes(as_format(name), shape) == quantize(weight, as_format(name)).nbytes


def test_sensitivities_foretell_the_damage() -> None:
    """The sum over layers of what each is expected to cost is what the whole costs, within a third."""
    model = tiny_model_in_memory("llama")
    rows = torch.randint(3, 259, (24, 48), generator=torch.Generator().manual_seed(2))
    moments, format = measure_moments(model, rows), as_format("int5_g32")
    weights = linear_weights(model)
    assert set(weights) == set(moments) and "lm_head" in weights
    expected = sum(
        expected_divergence(w, unpack(quantize(w, format, PLAIN)), moments[path]) for path, w in weights.items()
    )
    original = tiny_model_in_memory("llama")
    quantize_(model, Recipe(format, head=format, rounder="plain_rtn"))
    measured = divergence(model, original, rows).kl
    assert expected == pytest.approx(measured, rel=1 / 3)
    assert all(parameter.requires_grad for parameter in original.parameters())


def test_an_allocated_model_meets_the_budget_and_beats_one_width() -> None:
    rows = torch.randint(3, 259, (16, 48), generator=torch.Generator().manual_seed(3))
    original = tiny_model_in_memory("llama")
    # Layers that differ in what they matter: the residual stream hardly hears the first one.
    with torch.no_grad():
        original.model.layers[0].mlp.down_proj.weight.mul_(0.05)
        original.model.layers[0].self_attn.o_proj.weight.mul_(0.05)
    formats = [as_format(f"int{bits}_g32") for bits in OFFERED_BITS]
    moments, weights = measure_moments(original, rows), linear_weights(original)
    chosen = allocate_formats(weights, moments, formats, 3.5)
    assert sum(stored_bytes(chosen[path], tuple(w.shape)) for path, w in weights.items()) <= byte_budget(
        3.5, [tuple(w.shape) for w in weights.values()]
    )
    assert len(set(chosen.values())) > 1
    distances = []
    for overrides in (tuple((f"^{path}$", format) for path, format in chosen.items()), ()):
        model = tiny_model_in_memory("llama")
        model.load_state_dict(original.state_dict())
        quantize_(model, Recipe(as_format("int3_g32"), head=as_format("int3_g32"), overrides=overrides))
        distances.append(divergence(model, original, rows).kl)
    assert distances[0] < distances[1]


def test_every_width_that_is_offered_is_taken_at_some_budget() -> None:
    model, taken = tiny_model_in_memory("llama"), set()
    ids = Calibration(torch.randint(3, 259, (4, 24), generator=torch.Generator().manual_seed(1)))
    for bits in (2.6, 3.5, 5.0, 6.5, 8.5):
        recipe = allocate_bits(model, Recipe(as_format("int4_g64"), name="int4"), ids, bits)
        taken |= {format.bits for _, format in recipe.overrides if format is not None}
    assert taken == set(OFFERED_BITS) == {2, 3, 4, 5, 6, 8}


def test_a_tied_weight_is_allocated_once() -> None:
    model = tiny_model_in_memory("llama", tie_word_embeddings=True)
    weights = linear_weights(model)
    assert "lm_head" in weights and "model.embed_tokens" not in weights
    assert len(weights) == 2 * 7 + 1
    moments = measure_moments(model, torch.randint(3, 259, (2, 16)))
    assert allocate_formats(weights, moments, [as_format("int4")], 8.0)["lm_head"] == as_format("int4")


def test_the_command_spends_a_budget(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, text = tiny_model("llama", tmp_path / "dense"), tmp_path / "text.txt"
    text.write_text("Call me Ishmael. Some years ago, never mind how long precisely. " * 20)
    words = ["quantize", str(source), str(tmp_path / "out"), "--format", "int4_g32", "--bits", "4", "--json"]
    words += ["--calibration", str(text), "--length", "32", "--override", "0.mlp.up_proj$=int8"]
    assert main(words) == OK
    found = json.loads(capsys.readouterr().out)
    formats = {row["path"]: row["format"] for row in found["layers"]}
    assert formats["model.layers.0.mlp.up_proj"] == "int8"
    free = [row for row in found["layers"] if row["path"] != "model.layers.0.mlp.up_proj"]
    assert len({row["format"] for row in free}) > 1 and all(row["format"].endswith("_g32") for row in free)
    weights = sum(math.prod(row["shape"]) for row in free)
    assert 3.5 < sum(row["bytes_after"] for row in free) * 8 / weights <= 4
    assert main([*words[:4], "nf4", *words[5:], "--force"]) == FAILED
    assert "name an int format" in capsys.readouterr().err
    assert main([*words[:6], "2.1", *words[7:], "--force"]) == FAILED
    said = capsys.readouterr().err
    least = re.search(r"2\.1 bits a weight are too few: .* need ([\d.]+); ask for more bits", said)
    assert least is not None and main([*words[:6], least[1], *words[7:], "--force"]) == OK


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_experts_of_a_layer_have_their_part_of_the_budget(family: str) -> None:
    model = tiny_model_in_memory(family)
    ids = torch.randint(3, 259, (6, 24), generator=torch.Generator().manual_seed(1))
    grads = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    recipe = allocate_bits(model, Recipe(as_format("int4_g32"), name="int4"), Calibration(ids), 4.0)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == grads
    assert all(parameter.grad is None for parameter in model.parameters())
    report = quantize_(model, recipe)
    experts = [row for row in report.layers if row.role == "experts"]
    assert len(experts) == 2 * model.config.num_hidden_layers
    assert sum(row.bytes_after for row in report.layers) * 8 / sum(math.prod(r.shape) for r in report.layers) <= 4.01
    by_module: dict[str, set[str]] = {}
    for row in experts:
        by_module.setdefault(row.path.rpartition(".")[0], set()).add(row.format)
    assert all(len(formats) == 1 for formats in by_module.values())


def test_experts_cost_what_they_are_expected_to() -> None:
    """The divergence that gradients of experts predict, beside the one that is measured."""
    original, model = tiny_model_in_memory("mixtral"), tiny_model_in_memory("mixtral")
    rows = torch.randint(3, 259, (24, 32), generator=torch.Generator().manual_seed(1))
    moments, weights = measure_moments(original, rows), linear_weights(original)
    name = "model.layers.1.mlp.experts.down_proj"
    moved = weights[name] + 0.02 * torch.randn(weights[name].shape, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        model.get_parameter(name).copy_(moved)
    expected = expected_divergence(weights[name], moved, moments[name])
    assert 0.4 < expected / divergence(model, original, rows).kl < 2.5


def test_experts_that_saw_nothing_count_as_the_others_and_are_named() -> None:
    model = with_an_idle_expert()
    ids = torch.randint(3, 259, (1, 2), generator=torch.Generator().manual_seed(1))
    moments = measure_moments(model, ids)
    found = moments["model.layers.0.mlp.experts.down_proj"]
    assert found.idle
    busy = [index for index in range(4) if index not in found.idle]
    for index in found.idle:
        assert torch.allclose(found.inputs[index], found.inputs[busy].mean(0))
    recipe = allocate_bits(model, Recipe(as_format("int4_g32"), name="int4"), Calibration(ids), 4.0)
    notes = {row.path: row.note for row in quantize_(model, recipe).layers}
    assert "saw no token while bits were measured" in notes["model.layers.0.mlp.experts.down_proj"]
