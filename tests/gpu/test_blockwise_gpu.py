"""Calibrated rounding where the model is: the same algorithms on a GPU."""

import pytest
import torch

from lowbit.calibration import Calibration
from lowbit.options import GptqOptions
from lowbit.quantize import quantize_
from lowbit.recipe import recipe_named
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
