"""Calibration that says little or nothing, and models that fit an algorithm badly: each is survived, and said."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lowbit.calibration import Calibration
from lowbit.layers import LowBitLinear
from lowbit.options import AutoRoundOptions, AwqOptions, TeqOptions
from lowbit.quantize import quantize_
from lowbit.recipe import Recipe, recipe_named
from lowbit_assets import tiny_model_in_memory

IDS = torch.randint(3, 280, (8, 32), generator=torch.Generator().manual_seed(0))
# Every rounder, every scaler.
ALGORITHMS = [("rtn", ""), ("gptq", ""), ("autoround", ""), ("hqq", "awq"), ("rtn", "smoothquant"), ("rtn", "teq")]
QUICK = {"awq": AwqOptions(steps=3), "autoround": AutoRoundOptions(iterations=4), "teq": TeqOptions(steps=4, checks=2)}
pytestmark = pytest.mark.parametrize(("rounder", "scaler"), ALGORITHMS)


def recipe_of(rounder: str, scaler: str, format: str = "int4_g32") -> Recipe:
    recipe = recipe_named(format).replace(head=None, rounder=rounder, scaler=scaler)
    options: dict[str, Any] = {"rounder_options": QUICK.get(rounder), "scaler_options": QUICK.get(scaler)}
    return recipe.replace(**{name: value for name, value in options.items() if value is not None})


def finite(model: Any) -> bool:
    with torch.no_grad():
        return bool(torch.isfinite(model(IDS).logits).all())


def test_activations_of_zeros(rounder: str, scaler: str) -> None:
    model: Any = tiny_model_in_memory("llama", tie_word_embeddings=False)
    with torch.no_grad():
        model.model.embed_tokens.weight.zero_()
    report = quantize_(model, recipe_of(rounder, scaler), calibration=Calibration(IDS))
    assert finite(model) and len(report.layers) == 14
    if rounder == "gptq":
        assert all("saw nothing but zeros" in row.note for row in report.layers)


def test_inputs_that_are_all_the_same(rounder: str, scaler: str) -> None:
    """One token over and over: the Hessian of the first block has rank one."""
    model: Any = tiny_model_in_memory("llama")
    report = quantize_(model, recipe_of(rounder, scaler), calibration=Calibration(torch.full((2, 16), 7)))
    assert finite(model) and all(row.error < 0.5 for row in report.layers)
    if rounder == "gptq":
        assert any("damping raised" in row.note for row in report.layers) or all(
            row.error < 0.2 for row in report.layers
        )


def test_inputs_narrower_than_a_group(rounder: str, scaler: str) -> None:
    model: Any = tiny_model_in_memory("llama")
    report = quantize_(model, recipe_of(rounder, scaler, "int4_g1024"), calibration=Calibration(IDS))
    assert finite(model) and all(row.error < 0.5 for row in report.layers)
    held = [module for module in model.modules() if isinstance(module, LowBitLinear)]
    assert held and all(module.packed_weight.packed().scales.shape[-1] == 1 for module in held)
