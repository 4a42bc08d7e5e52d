"""AutoRound: a block's error below round-to-nearest's, on any integer grid, and what rows it may be tuned on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from lowbit.algorithms.autoround import _descend, _Rows, _Tuned, first_rate, tune_block
from lowbit.algorithms.rtn import round_weight
from lowbit.bits import spread_groups
from lowbit.calibration import Calibration
from lowbit.errors import RecipeError
from lowbit.formats import Format, as_format
from lowbit.grid import unpack
from lowbit.models.capture import Call, first_calls, run_block
from lowbit.options import AUTOROUND_RECIPES, AutoRoundOptions
from lowbit.packing import PackedTensor
from lowbit.quantize import quantize_
from lowbit.recipe import Recipe, recipe_named
from lowbit.report import Report
from lowbit_assets import tiny_model_in_memory

QUICK = AutoRoundOptions(iterations=40)


class Mixer(nn.Module):
    """A block of two linears that gives a tuple and takes its rows as they come."""

    def __init__(self, size: int = 40) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.up, self.down = nn.Linear(size, 2 * size), nn.Linear(2 * size, size)

    def forward(self, hidden: torch.Tensor, scale: torch.Tensor | None = None) -> tuple[torch.Tensor, None]:
        inner = self.up(hidden).relu()
        return hidden + self.down(inner if scale is None else inner * scale), None


class Shuffler(Mixer):
    """A block whose rows depend on one another: it cannot be run on some of them."""

    def forward(self, hidden: torch.Tensor, scale: torch.Tensor | None = None) -> tuple[torch.Tensor, None]:
        return super().forward(hidden + hidden.mean(0, keepdim=True))


def mixer_calls(rows: int = 8, beside: Callable[[int], dict[str, Any]] = lambda i: {}) -> list[Call]:
    """Four calls with inputs that depend on one another: with independent ones nothing is better than the nearest."""
    generator = torch.Generator().manual_seed(3)
    mixed = torch.randn(10, 40, generator=generator)
    return [Call((torch.randn(rows, 12, 10, generator=generator) @ mixed,), beside(i), 0) for i in range(4)]


def block_error(
    block: nn.Module, packs: dict[str, PackedTensor], calls: Sequence[Call], targets: Sequence[torch.Tensor]
) -> float:
    weights = {f"{path}.weight": unpack(packed) for path, packed in packs.items()}
    outputs = [torch.func.functional_call(block, weights, call.args, call.kwargs) for call in calls]
    firsts = [output[0] if isinstance(output, tuple) else output for output in outputs]
    return sum(float((first.detach() - target).square().mean()) for first, target in zip(firsts, targets, strict=True))


def errors_of(
    block: nn.Module, calls: list[Call], format: Format, options: AutoRoundOptions = QUICK
) -> tuple[float, float]:
    """The error of a block whose linears are tuned, and of the same rounded to nearest."""
    targets = [run_block(block, call) for call in calls]
    paths = [path for path, module in block.named_modules() if isinstance(module, nn.Linear)]
    tuned = tune_block(block, dict.fromkeys(paths, format), calls, targets, options)
    nearest = {path: round_weight(block.get_submodule(path).weight, format) for path in paths}
    with torch.no_grad():
        return block_error(block, tuned, calls, targets), block_error(block, nearest, calls, targets)


@pytest.mark.parametrize(
    ("name", "gain"),
    [("int2_g32", 0.8), ("int3_g32", 0.8), ("int4_g32", 0.85), ("int4_asym_g32", 0.85), ("int4_fine_g32", 0.85)],
)
def test_a_tuned_layer_of_a_model_is_nearer_than_a_rounded_one(name: str, gain: float) -> None:
    model = tiny_model_in_memory("llama")
    rows = torch.randint(3, 259, (16, 24), generator=torch.Generator().manual_seed(0))
    tuned, nearest = errors_of(model.model.layers[0], first_calls(model, list(rows.view(2, 8, 24))), as_format(name))
    assert tuned < gain * nearest


@pytest.mark.parametrize(
    "name",
    [
        "int3_asym_channel",
        "int4_tensor",
        "int2_asym_g32",
        "int4_g32_dq",
        "int3_g24",
        "int8",
        "int3_fine_g24",
        "int4_fine_g32_dq",
    ],
)
def test_every_integer_grid_is_tuned(name: str) -> None:
    tuned, nearest = errors_of(Mixer(), mixer_calls(), as_format(name))
    assert tuned < nearest


def test_the_block_is_left_as_it_was() -> None:
    block = Mixer()
    before = {name: value.clone() for name, value in block.state_dict().items()}
    errors_of(block, mixer_calls(), as_format("int3"))
    assert all(torch.equal(value, before[name]) for name, value in block.state_dict().items())
    assert all(parameter.grad is None for parameter in block.parameters())


def test_a_seed_decides_everything() -> None:
    calls = mixer_calls()
    targets = [run_block(Mixer(), call) for call in calls]
    tune = partial(tune_block, Mixer(), {"up": as_format("int3")}, calls, targets)
    first, again, other = tune(QUICK), tune(QUICK), tune(AutoRoundOptions(iterations=40, seed=1))
    assert torch.equal(first["up"].codes, again["up"].codes)
    assert not torch.equal(first["up"].codes, other["up"].codes)


def test_rows_with_something_of_their_own_beside_them() -> None:
    """What a row gets beside the hidden state stays with it, whichever rows are run together."""
    generator = torch.Generator().manual_seed(8)
    scales = torch.rand(4, 8, 1, 80, generator=generator) * 4
    own, _ = errors_of(Mixer(), mixer_calls(beside=lambda i: {"scale": scales[i]}), as_format("int2"))
    alone = [
        Call((call.args[0][row : row + 1],), {"scale": scales[i, row : row + 1]}, 0)
        for i, call in enumerate(mixer_calls())
        for row in range(8)
    ]
    tuned, nearest = errors_of(Mixer(), alone, as_format("int2"))
    assert tuned < nearest
    assert own * 8 == pytest.approx(tuned, rel=1e-4)


def test_a_block_that_mixes_rows_is_tuned_on_whole_calls() -> None:
    tuned, nearest = errors_of(Shuffler(), mixer_calls(), as_format("int3"))
    assert tuned < nearest


@pytest.mark.parametrize(("name", "left_out"), [("int2_g20", True), ("int3_g20", True), ("int4_g20", False)])
def test_at_two_and_three_bits_the_largest_errors_are_left_out_of_the_loss(name: str, left_out: bool) -> None:
    calls = mixer_calls()
    targets = [run_block(Mixer(), call) for call in calls]
    targets[0][0, 0, :4] += 1e3  # a few outputs that no rounding reaches
    packs = [
        tune_block(Mixer(), {"down": as_format(name)}, calls, targets, AutoRoundOptions(iterations=20, outliers=share))
        for share in (0.0, 0.01)
    ]
    assert torch.equal(packs[0]["down"].codes, packs[1]["down"].codes) is not left_out


@pytest.mark.parametrize("name", ["int4_g20", "int3_asym_g20"])
def test_steps_that_are_far_too_large_leave_the_start(name: str) -> None:
    """The parameters with the least loss are kept: those of the start, if none was better."""
    wild = AutoRoundOptions(iterations=4, rate=0.5, range_rate=0.5)
    tuned, nearest = errors_of(Mixer(), mixer_calls(), as_format(name), wild)
    assert tuned <= nearest * 1.0001


def test_the_parameters_of_the_best_step_are_kept() -> None:
    """Neither those of the start nor the last: here the first of three steps finds what the others lose again."""
    calls, linears = mixer_calls(), dict.fromkeys(("up", "down"), as_format("int4_g20"))
    block, targets = Mixer(), [run_block(Mixer(), call) for call in calls]
    # All rows in every mini-batch, so that its loss is that of the text.
    options = AutoRoundOptions(iterations=3, batch_rows=64, rate=0.02, range_rate=0.02)
    tuned = {path: _Tuned(block, path, format, None) for path, format in linears.items()}
    text = _Rows(block, calls, targets)
    losses = [float(text.losses(tuned).sum())]
    with torch.enable_grad():
        _descend(text, tuned, text.losses(tuned), options, lambda *_: losses.append(float(text.losses(tuned).sum())))
    assert len(losses) == 4 and losses[1] < 0.98 * min(losses[0], losses[2], losses[3])
    packs = tune_block(block, linears, calls, targets, options)
    with torch.no_grad():  # `losses` adds up means of rows, of which a call has eight
        assert block_error(block, packs, calls, targets) * 8 == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.parametrize("name", ["int2_g20", "int3_asym_g20"])
def test_votes_and_ranges_each_gain_alone(name: str) -> None:
    """Votes turn a weight to its other neighbour under the scales of the start; ranges move scales by factors near 1."""
    format, calls, none = as_format(name), mixer_calls(), 1e-12
    targets = [run_block(Mixer(), call) for call in calls]
    start = {path: round_weight(Mixer().get_submodule(path).weight.detach(), format) for path in ("up", "down")}
    found = {}
    for tuned, (rate, range_rate) in {"votes": (0.025, none), "ranges": (none, 0.01)}.items():
        options = AutoRoundOptions(iterations=40, rate=rate, range_rate=range_rate)
        found[tuned] = tune_block(Mixer(), dict.fromkeys(start, format), calls, targets, options)
        with torch.no_grad():
            assert block_error(Mixer(), found[tuned], calls, targets) < 0.97 * block_error(
                Mixer(), start, calls, targets
            )
    for path, plain in start.items():
        votes, ranges = found["votes"][path], found["ranges"][path]
        torch.testing.assert_close(votes.scales, plain.scales, rtol=2e-3, atol=0)  # a last bit of fp16
        assert not torch.equal(votes.codes, plain.codes)
        moved = (unpack(votes) - unpack(plain)).abs() / spread_groups(
            plain.scales.float(), format, plain.shape[-1]
        ).abs()
        assert float(moved.max()) == pytest.approx(1, abs=1e-2)
        assert float((ranges.scales / plain.scales - 1).abs().max()) > 0.02
        # 40 steps of 0.01 that fall to nothing.
        assert float((ranges.scales / plain.scales - 1).abs().max()) < 0.21


def test_a_step_goes_by_the_sign_alone() -> None:
    """After one, each scale has been multiplied by 1 plus or minus the rate, however steep its slope is, or was left."""
    calls, format = mixer_calls(), as_format("int3_g20").replace(scale_dtype="float32")
    targets = [run_block(Mixer(), call) for call in calls]
    options = AutoRoundOptions(iterations=1, rate=1e-12, range_rate=1e-3)
    tuned = tune_block(Mixer(), {"up": format}, calls, targets, options)["up"]
    ratios = tuned.scales / round_weight(Mixer().up.weight.detach(), format).scales
    away = (ratios - 1).abs()
    assert bool(((away - 1e-3).abs() < 1e-6).logical_or(away < 1e-6).all()) and len(ratios.sign().unique()) == 1
    assert bool((ratios > 1).any()) and bool((ratios < 1).any())


def test_importance_moves_the_start() -> None:
    calls = mixer_calls()
    targets = [run_block(Mixer(), call) for call in calls]
    importance = torch.cat([call.args[0] for call in calls]).square().mean((0, 1))
    one_step = AutoRoundOptions(iterations=1, rate=1e-9)
    blind = tune_block(Mixer(), {"up": as_format("int2")}, calls, targets, one_step)
    aware = tune_block(Mixer(), {"up": as_format("int2")}, calls, targets, one_step, {"up": importance})
    with torch.no_grad():
        assert block_error(Mixer(), aware, calls, targets) < block_error(Mixer(), blind, calls, targets)


def test_what_cannot_be_tuned_is_refused() -> None:
    calls = mixer_calls()
    targets = [run_block(Mixer(), call) for call in calls]
    with pytest.raises(RecipeError, match="up is to be nf4"):
        tune_block(Mixer(), {"up": as_format("nf4")}, calls, targets)
    with pytest.raises(RecipeError, match="calls of the block with a target for each"):
        tune_block(Mixer(), {"up": as_format("int4")}, calls, [])
    with pytest.raises(RecipeError, match="at least one iteration"):
        AutoRoundOptions(iterations=0)


def test_the_rates_of_recipes() -> None:
    rates = {
        (name, bits): first_rate(options, {bits})
        for name, options in AUTOROUND_RECIPES.items()
        for bits in (2, 3, 4, 5, 8)
    }
    assert rates["light", 4] == rates["light", 8] == 5e-3
    assert rates["default", 4] == 2 / 200
    assert {rates["default", bits] for bits in (2, 3, 5, 8)} == {1 / 200}
    assert rates["best", 4] == 2 / 1000 and rates["best", 8] == 1 / 1000
    assert {first_rate(AUTOROUND_RECIPES["default"], mixed) for mixed in ({4, 6}, {3, 4})} == {1 / 200}
    assert AUTOROUND_RECIPES["best"].samples == 512


IDS = torch.randint(3, 280, (64, 32), generator=torch.Generator().manual_seed(2))
HELD_OUT = torch.randint(3, 280, (8, 32), generator=torch.Generator().manual_seed(1))


def moved(family: str, recipe: Recipe, calibration: Calibration | None = None) -> tuple[float, Report]:
    """How far a model's logits are moved by rounding its weights, and the report of it."""
    model = tiny_model_in_memory(family)
    with torch.no_grad():
        expected = model(HELD_OUT).logits
        report = quantize_(model, recipe, calibration=calibration)
        return float((model(HELD_OUT).logits - expected).norm() / expected.norm()), report


@pytest.mark.parametrize("options", [QUICK, AutoRoundOptions(iterations=40, enable_quanted_input=False)])
def test_a_whole_model_is_nearer_than_rounded(options: AutoRoundOptions) -> None:
    recipe = recipe_named("int2_g32").replace(head=None)
    nearest, _ = moved("llama", recipe, Calibration(IDS))
    tuned, report = moved("llama", recipe.replace(rounder="autoround", rounder_options=options), Calibration(IDS))
    assert tuned < 0.9 * nearest
    assert len(report.layers) == 14 and not any(row.note for row in report.layers)


def test_what_is_not_tuned_is_said() -> None:
    """Experts, and formats that are no integers, are rounded to nearest; the recipe survives being saved."""
    recipe = recipe_named("int3_g32").replace(head=None, rounder="autoround", rounder_options=QUICK)
    recipe = recipe.replace(overrides=(("o_proj$", as_format("nf4")),))
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    _, report = moved("qwen3_moe", recipe, Calibration(IDS[:8]))
    notes = {row.path.partition("layers.0.")[2]: row.note for row in report.layers}
    assert notes["self_attn.q_proj"] == "" and "autoround tunes the linears" in notes["self_attn.o_proj"]
    assert "autoround tunes the linears" in notes["mlp.experts.down_proj"]
