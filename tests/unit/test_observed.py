"""Eight bits from what somebody else's loop showed: watched, written down, read again, quantised; and tuned to a measure."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lowbit.errors import CheckpointError, RecipeError
from lowbit.interop.qconf_summary import read_summary, write_summary
from lowbit.layers import LowBitLinear
from lowbit.observed import (
    Candidate,
    Criterion,
    Watch,
    check_summary,
    find_model_groups,
    quantize_from_summary_,
    tune,
)
from lowbit.swap import copy_model
from lowbit_assets import tiny_model_in_memory

IDS = torch.randint(3, 280, (8, 24), generator=torch.Generator().manual_seed(0))
HELD_OUT = torch.randint(3, 280, (4, 24), generator=torch.Generator().manual_seed(1))
OBSERVERS = {"activation_observer": {"name": "MinMaxObserver"}, "weight_observer": {"name": "PerChannelMinMaxObserver"}}
DOWN = "model.layers.1.mlp.down_proj"


@torch.no_grad()
def logits_of(model: Any) -> torch.Tensor:
    result: torch.Tensor = model(HELD_OUT).logits
    return result


def error_of(model: Any, expected: torch.Tensor) -> float:
    return float((logits_of(model) - expected).norm() / expected.norm())


def with_outliers(family: str = "llama") -> Any:
    """A tiny model in which some channels of the norms' outputs are 40 times as large, as trained models have them."""
    model = tiny_model_in_memory(family)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and parameter.dim() == 1:
                parameter[::16] *= 40
            if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight", "up_proj.weight")):
                parameter[:, ::16] /= 40
    return model


def watched(model: Any, alpha: float | None = 0.5) -> tuple[Watch, list[Any], list[Any]]:
    groups = find_model_groups(model, (IDS,), {})
    watch = Watch(model)
    with torch.no_grad():
        model(IDS)
    watch.remove()
    return watch, groups, watch.summarize(alpha, groups)


def test_a_model_is_quantised_from_what_was_seen_and_smoothing_helps() -> None:
    model = with_outliers()
    expected = logits_of(model)
    errors = {}
    for alpha in (None, 0.5):
        made = copy_model(model)
        quantize_from_summary_(made, watched(model, alpha)[2])
        errors[alpha] = error_of(made, expected)
    assert errors[0.5] < 0.08 and errors[0.5] < errors[None] * 0.6
    layer = made.get_submodule(DOWN)
    assert isinstance(layer, LowBitLinear) and layer.packed_weight.format.name == "w8a8_static"
    assert layer.packed_weight.kernel is not None and layer.packed_weight.kernel.name == "core_fixed"
    row = next(row for row in made.lowbit_report.layers if row.path == DOWN)
    assert row.format == "w8a8_static" and "smoothed" in row.note and row.kernel == "core_fixed"


def test_the_original_keeps_its_numbers() -> None:
    model = with_outliers()
    expected = logits_of(model)
    made = copy_model(model)
    quantize_from_summary_(made, watched(model)[2])
    assert torch.equal(logits_of(model), expected)
    assert not any(isinstance(module, LowBitLinear) for module in model.modules())


def test_folded_weights_are_what_folding_gives() -> None:
    model = with_outliers()
    _, _, linears = watched(model)
    folded = copy_model(model)
    folds = check_summary(folded, linears)
    from lowbit.observed.smoothing import FoldedWeights, fold_

    foreseen = {linear.path: FoldedWeights(model, folds).read(linear.path) for linear in linears}
    fold_(folded, folds)
    assert torch.allclose(logits_of(folded), logits_of(model), atol=1e-3)
    for path, weight in foreseen.items():
        assert torch.allclose(folded.get_submodule(path).weight, weight, rtol=1e-4, atol=1e-6)
    assert {fold.group.previous.rpartition(".")[2] for fold in folds} >= {"input_layernorm", "up_proj"}


def test_a_summary_is_a_file_that_reads_and_writes_the_same(tmp_path: Path) -> None:
    model = with_outliers()
    _, _, linears = watched(model)
    first, second = tmp_path / "a.json", tmp_path / "b.json"
    write_summary(first, linears, OBSERVERS)
    again = read_summary(first)
    write_summary(second, again, OBSERVERS)
    assert first.read_text() == second.read_text()
    fields = json.loads(first.read_text())
    info = fields["model.layers.1.mlp"]["q_op_infos"]["2"]
    assert info["fqn"] == DOWN and info["activation_observer"] == {"name": "MinMaxObserver"}
    made, straight = copy_model(model), copy_model(model)
    quantize_from_summary_(made, again)
    quantize_from_summary_(straight, linears)
    assert torch.allclose(logits_of(made), logits_of(straight), atol=1e-4)


def test_a_layer_can_be_left_by_hand_and_its_range_edited(tmp_path: Path) -> None:
    model = tiny_model_in_memory("llama")
    file = tmp_path / "summary.json"
    write_summary(file, watched(model, None)[2], OBSERVERS)
    fields = json.loads(file.read_text())
    info = fields["model.layers.1.mlp"]["q_op_infos"]["2"]["input_tensor_infos"][0]
    info["inf_dtype"] = "torch.float32"
    other = fields["model.layers.0.mlp"]["q_op_infos"]["2"]["input_tensor_infos"][0]
    other["scale"], other["zero_point"] = [0.5], [100]
    file.write_text(json.dumps(fields))
    made = copy_model(model)
    quantize_from_summary_(made, read_summary(file))
    assert type(made.get_submodule(DOWN)) is nn.Linear
    edited: Any = made.get_submodule("model.layers.0.mlp.down_proj")
    assert edited.packed_weight.tensors["input_range"].tolist() == [-50.0, 77.5]


def test_a_summary_without_places_folds_where_the_model_lets_it(tmp_path: Path) -> None:
    """As the other system writes it: factors, and no word about where they could go."""
    model = with_outliers()
    file = tmp_path / "summary.json"
    _, groups, linears = watched(model)
    write_summary(file, linears, OBSERVERS)
    fields = json.loads(file.read_text())
    for module in fields.values():
        for operation in module["q_op_infos"].values():
            operation.pop("lowbit", None)
    file.write_text(json.dumps(fields))
    expected = logits_of(model)
    placed, unplaced = copy_model(model), copy_model(model)
    quantize_from_summary_(placed, read_summary(file), groups)
    assert error_of(placed, expected) < 0.08
    report = quantize_from_summary_(unplaced, read_summary(file))
    assert any("folds into no weight" in row.note for row in report.layers)
    plain = copy_model(model)
    quantize_from_summary_(plain, watched(model, None)[2])
    assert error_of(unplaced, expected) < error_of(plain, expected)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda model: tiny_model_in_memory("gpt2"), "model.layers.0.self_attn.q_proj is not in this one"),
        (lambda model: tiny_model_in_memory("llama", num_hidden_layers=3), "says nothing of model.layers.2"),
        (lambda model: tiny_model_in_memory("llama", intermediate_size=96), "gate_proj has 160 outputs there and 96"),
        (
            lambda model: tiny_model_in_memory("llama", seed=1),
            "the weights of model.layers.0.self_attn.q_proj are others",
        ),
    ],
)
def test_a_summary_of_another_model_is_refused_by_the_layer(change: Any, words: str) -> None:
    model = tiny_model_in_memory("llama")
    linears = watched(model)[2]
    with pytest.raises(CheckpointError, match=words.replace(".", r"\.")):
        quantize_from_summary_(change(model), linears)


def test_damaged_summaries_are_told(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no summary"):
        read_summary(tmp_path / "absent.json")
    file = tmp_path / "a.json"
    file.write_text('{" ": {"q_op_infos": {}}}')
    with pytest.raises(CheckpointError, match="names no linear"):
        read_summary(file)
    file.write_text('{" ": {"q_op_infos": {"0": {"op_type": "Linear", "fqn": "x"}}}}')
    with pytest.raises(CheckpointError, match="damaged at the linear 'x'"):
        read_summary(file)


def test_nothing_seen_is_told() -> None:
    with pytest.raises(RecipeError, match="has not been run yet"):
        Watch(tiny_model_in_memory("llama")).summarize(0.5)


def test_a_small_model_without_blocks_is_smoothed_as_a_whole() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8)).eval()
    with torch.no_grad():
        model[0].weight[::8] *= 50  # type: ignore[operator]
        model[1].weight[:, ::8] /= 50  # type: ignore[operator, index]
    x = torch.randn(64, 32)
    groups = find_model_groups(model, (x,), {})
    assert {group.previous for group in groups} == {"0", "1"}
    expected, errors = model(x).detach(), {}
    for alpha in (None, 0.5):
        watch = Watch(model)
        model(x)
        watch.remove()
        made = copy_model(model)
        quantize_from_summary_(made, watch.summarize(alpha, groups))
        errors[alpha] = float((made(x).detach() - expected).norm() / expected.norm())
    assert errors[0.5] < 0.03 and errors[0.5] < errors[None] / 2


def test_a_range_that_is_too_wide_gives_way_to_rows() -> None:
    """Trained models give their first token a size of hundreds, and all others one of one."""
    linears = watched(tiny_model_in_memory("llama"), None)[2]
    assert all(linear.noise is not None and 0 < linear.noise < 0.01 for linear in linears)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 8)).eval()
    x = torch.randn(2100, 32)
    seen = torch.cat([x[:2000], torch.zeros(1, 32).index_fill(1, torch.tensor([3]), 300.0)])
    watch = Watch(model)
    with torch.no_grad():
        model(seen)
        expected = model(x[2000:])
    watch.remove()
    found = watch.summarize()
    assert all(linear.noise is not None and linear.noise > 0.01 for linear in found)
    errors = []
    for given in (found, [replace(linear, noise=None) for linear in found]):
        made = copy_model(model)
        report = quantize_from_summary_(made, given)
        with torch.no_grad():
            errors.append(float((made(x[2000:]) - expected).norm() / expected.norm()))
        rows = given is found
        assert {row.format for row in report.layers} == {"w8a8" if rows else "w8a8_static"}
        assert all(("each row of it has its own scale" in row.note) is rows for row in report.layers)
    assert errors[0] < 0.02 and errors[0] < errors[1] / 10


def test_tuning_takes_the_first_that_is_good_enough_and_the_best_with_time() -> None:
    scores = {"a": 0.5, "b": 0.95, "c": 0.99}
    made: list[str] = []

    def candidate(name: str) -> Candidate:
        def make() -> nn.Module:
            made.append(name)
            module = nn.Identity()
            module.accuracy = scores[name]  # type: ignore[assignment]
            return module

        return Candidate(name, name, make)

    candidates = [candidate(name) for name in scores]
    found = tune(1.0, candidates, lambda model: model.accuracy, Criterion("relative", 0.1))
    assert found.candidate.name == "b" and made == ["a", "b"] and found.tried == (("a", 0.5), ("b", 0.95))
    assert tune(1.0, candidates, lambda m: m.accuracy, Criterion("absolute", 0.1), 60).candidate.name == "c"
    with pytest.raises(
        RecipeError, match=r"none of 3 candidates keeps the accuracy of 1 within 0\.001 .* the best is c"
    ):
        tune(1.0, candidates, lambda model: model.accuracy, Criterion("relative", 0.001))
    with pytest.raises(RecipeError, match="a criterion is"):
        Criterion("both", 0.1)  # type: ignore[arg-type]


def test_a_copy_shares_numbers_and_not_modules() -> None:
    model = tiny_model_in_memory("llama")
    made = copy_model(model)
    assert made.lm_head.weight.data_ptr() == model.lm_head.weight.data_ptr()
    made.to(torch.bfloat16)
    assert model.dtype == torch.float32 and made.dtype == torch.bfloat16
    assert copy.deepcopy(made).lm_head.weight.data_ptr() != made.lm_head.weight.data_ptr()
