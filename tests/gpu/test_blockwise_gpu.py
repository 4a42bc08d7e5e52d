"""Calibrated rounding where the model is: the same algorithms on a GPU."""

import pytest
import torch

from lowbit.algorithms.gptq import round_columns
from lowbit.algorithms.replay import replayed
from lowbit.calibration import Calibration
from lowbit.formats import as_format
from lowbit.grid import fit_grid
from lowbit.options import GptqOptions
from lowbit.quantize import quantize_
from lowbit.recipe import recipe_named
from lowbit.search import Search
from lowbit_assets import tiny_model_in_memory

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
IDS = torch.randint(3, 280, (64, 32), generator=torch.Generator().manual_seed(2))
HELD_OUT = torch.randint(3, 280, (4, 32), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("options", [GptqOptions(correction=0.0), GptqOptions(true_sequential=False)])
def test_gptq_on_the_gpu_is_as_good_as_on_the_cpu(family: str, options: GptqOptions) -> None:
    recipe = recipe_named("int3_g32").replace(head=None)
    gptq = recipe.replace(rounder="gptq", rounder_options=options)
    runs = {"cuda": gptq, "cpu": gptq, "plain": recipe.replace(rounder="plain_rtn")}
    errors = {}
    for name, chosen in runs.items():
        model = tiny_model_in_memory(family).to("cuda" if name == "cuda" else "cpu")
        with torch.no_grad():
            expected = model(HELD_OUT.to(model.device)).logits
            quantize_(model, chosen, calibration=None if name == "plain" else Calibration(IDS))
            found = model(HELD_OUT.to(model.device)).logits
        assert all(tensor.device == model.device for tensor in model.state_dict().values())
        errors[name] = float((found - expected).norm() / expected.norm())
    assert errors["cuda"] == pytest.approx(errors["cpu"], rel=0.1)
    assert errors["cuda"] < errors["plain"]


@pytest.mark.parametrize("name", ["int4_g64", "int3_asym_g64", "int4_fine_g64", "nf4_g64", "fp8_e4m3_g64"])
def test_columns_are_rounded_in_a_recording_as_without_one(name: str) -> None:
    format, generator = as_format(name), torch.Generator("cuda").manual_seed(0)
    factor = torch.randn(64, 64, device="cuda", generator=generator).triu() * 0.1 + torch.eye(64, device="cuda")
    for _ in range(3):
        weight = torch.randn(64, 96, device="cuda", generator=generator)
        grid = fit_grid(weight.t().contiguous(), format, Search())
        zero = None if grid.zeros is None else grid.zeros.t().contiguous()
        given = (weight, factor, grid.scales.t().contiguous(), zero)
        for found, expected in zip(
            replayed(round_columns, *given, fixed=format),
            round_columns(*(None if part is None else part.clone() for part in given), format),
            strict=True,
        ):
            assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ["int4_g64", "int3_asym_g64", "int4_fine_g64", "nf4_g64", "mxfp4", "nvfp4"])
def test_candidates_tried_together_are_judged_as_one_by_one(name: str) -> None:
    weight = torch.randn(96, 256, generator=torch.Generator().manual_seed(0))
    format = as_format(name)
    here, there = fit_grid(weight, format, Search()), fit_grid(weight.cuda(), format, Search())
    assert (there.scales.cpu() - here.scales).abs().gt(here.scales.abs() * 1e-3).float().mean() < 0.01
