"""Scalers and rounders combine freely, over whole models."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import lowbit
from lowbit.algorithms import ROUNDERS
from lowbit.algorithms import SCALERS as SCALERS_OF_THE_PACKAGE
from lowbit.blockwise import Where
from lowbit.calibration import Calibration
from lowbit.layers import LowBitLinear
from lowbit.options import AutoRoundOptions, AwqOptions, Options, SmoothQuantOptions, TeqOptions
from lowbit.quantize import quantize_
from lowbit.recipe import Recipe, recipe_named
from lowbit_assets import tiny_model_in_memory

CALIBRATION = Calibration(torch.randint(3, 280, (32, 32), generator=torch.Generator().manual_seed(2)))
HELD_OUT = torch.randint(3, 280, (4, 32), generator=torch.Generator().manual_seed(1))
INT3 = recipe_named("int3_g32").replace(head=None)
SCALERS: dict[str, Options] = {
    "awq": AwqOptions(steps=10),
    "smoothquant": SmoothQuantOptions(),
    "teq": TeqOptions(steps=30, rate=0.03),
}


def model_with_outliers(family: str = "llama") -> nn.Module:
    """A tiny model some of whose channels are far larger than the others, behind every norm of a block."""
    model = tiny_model_in_memory(family)
    with torch.no_grad():
        for layer in model.model.layers:
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                norm.weight[::13] *= 12
    return model


def logits_of(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(HELD_OUT).logits


def distance(recipe: Recipe, family: str = "llama") -> float:
    """How far rounding moves a model's logits on tokens that nothing was calibrated on."""
    model = model_with_outliers(family)
    expected = logits_of(model)
    quantize_(model, recipe, calibration=CALIBRATION)
    return float((logits_of(model) - expected).norm() / expected.norm())


@pytest.mark.parametrize("scaler", SCALERS)
@pytest.mark.parametrize("rounder", ["rtn", "gptq"])
def test_every_scaler_goes_with_every_rounder(rounder: str, scaler: str) -> None:
    recipe = INT3.replace(rounder=rounder)
    model = model_with_outliers()
    expected = logits_of(model)
    report = quantize_(
        model, recipe.replace(scaler=scaler, scaler_options=SCALERS[scaler]), calibration=CALIBRATION, prepare=False
    )
    assert all(scaler in row.note for row in report.layers)
    error = float((logits_of(model) - expected).norm() / expected.norm())
    plain = distance(recipe)
    # GPTQ takes the inputs into account by itself, so that a scale leaves it less to win.
    assert error < (plain if rounder == "rtn" else 1.1 * plain)


QUICK: dict[str, Options] = {
    "awq": AwqOptions(steps=2),
    "smoothquant": SmoothQuantOptions(search=False),
    "teq": TeqOptions(steps=4, checks=2),
    "autoround": AutoRoundOptions(iterations=4),
}


@pytest.mark.parametrize("scaler", sorted(SCALERS))
@pytest.mark.parametrize("rounder", sorted(ROUNDERS))
def test_no_pair_is_left_out(rounder: str, scaler: str) -> None:
    assert set(SCALERS) == set(SCALERS_OF_THE_PACKAGE)
    options = {"rounder_options": QUICK.get(rounder), "scaler_options": QUICK[scaler]}
    recipe = INT3.replace(rounder=rounder, scaler=scaler, **{name: one for name, one in options.items() if one})
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    model = model_with_outliers()
    expected = logits_of(model)
    report = quantize_(model, recipe, calibration=CALIBRATION)
    assert len(report.layers) == 14 and all(scaler in row.note for row in report.layers)
    # Three bits and hardly any search: a fold that is wrong would leave nothing alike.
    assert float((logits_of(model) - expected).norm() / expected.norm()) < 0.8


def test_what_was_scaled_is_saved_loaded_and_resumed(tmp_path: Path) -> None:
    recipe = INT3.replace(scaler="awq", scaler_options=AwqOptions(steps=4))
    model = model_with_outliers()
    quantize_(model, recipe, calibration=CALIBRATION, where=Where(tmp_path / "run"))
    resumed = model_with_outliers()
    quantize_(resumed, recipe, calibration=CALIBRATION, where=Where(tmp_path / "run"))
    assert torch.equal(logits_of(resumed), logits_of(model))
    lowbit.optimize_model(saved := model_with_outliers(), None, recipe=recipe, calibration=CALIBRATION)
    saved.save_low_bit(tmp_path / "small")
    loaded = lowbit.AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert torch.equal(logits_of(loaded), logits_of(saved))
    assert loaded.lowbit_recipe == recipe


def test_experts_are_scaled_too() -> None:
    recipe = INT3.replace(scaler="awq", scaler_options=AwqOptions(steps=4, clip=False))
    model = model_with_outliers("mixtral")
    report = quantize_(model, recipe, calibration=CALIBRATION)
    notes = {row.path: row.note for row in report.layers if "experts" in row.path}
    assert len(notes) == 4
    assert all("awq: ratio" in note or "experts have a scale" in note for note in notes.values())


class _Mixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.inner, self.outer = nn.LayerNorm(64), nn.Linear(64, 96), nn.Linear(96, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.outer(torch.relu(self.inner(self.norm(x))))


class _Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(288, 64)
        self.blocks = nn.ModuleList(_Mixer() for _ in range(3))
        self.blocks[2].inner.weight = self.blocks[0].inner.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.table(ids)
        for block in self.blocks:
            x = block(x)
        return x


def test_weights_that_blocks_share_are_not_scaled() -> None:
    model = _Plain()
    shared = model.blocks[0].inner.weight.detach().clone()
    recipe = recipe_named("int8").replace(scaler="awq", scaler_options=AwqOptions(steps=4), skip=("inner",))
    with torch.no_grad():
        expected = model(HELD_OUT)
    report = quantize_(model, recipe, calibration=CALIBRATION)
    notes = {row.path: row.note for row in report.layers}
    assert "inner.weight is the weight of another block too" in notes["blocks.0.outer"]
    assert "ratio" in notes["blocks.1.outer"] or "no scale" in notes["blocks.1.outer"]
    assert torch.equal(model.blocks[0].inner.weight, shared)
    assert isinstance(model.blocks[0].outer, LowBitLinear)
    torch.testing.assert_close(model(HELD_OUT).detach(), expected, rtol=0.1, atol=0.1)


def test_a_scale_that_hurts_what_really_rounds_is_not_kept() -> None:
    """SmoothQuant at its end takes all of the activations' range into the weights: nothing for four bits of weights alone."""
    recipe = INT3.replace(rounder="gptq")
    models = [model_with_outliers() for _ in range(2)]
    quantize_(models[0], recipe, calibration=CALIBRATION)
    options = SmoothQuantOptions(alpha=1.0, search=False)
    scaled = recipe.replace(scaler="smoothquant", scaler_options=options)
    report = quantize_(models[1], scaled, calibration=CALIBRATION)
    assert all("without a scale" in row.note and "so none is kept" in row.note for row in report.layers)
    assert torch.equal(logits_of(models[0]), logits_of(models[1]))


def test_the_error_of_a_block_decides_about_its_scale() -> None:
    report = quantize_(model_with_outliers(), INT3.replace(rounder="gptq", scaler="awq"), calibration=CALIBRATION)
    for row in report.layers:
        with_scale, without = map(float, re.findall(r"with gptq ([\d.e-]+), without a scale ([\d.e-]+)", row.note)[0])
        assert with_scale >= without if "none is kept" in row.note else with_scale <= without
