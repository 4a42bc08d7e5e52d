"""Every algorithm where the model is: on a GPU it finds what it finds on the CPU, but for sums in another order.

Where one is within a rounding of the other, the same is asked of nearly all codes: a sum that ends a bit higher moves a weight
that lay between two codes, and what is searched or tuned goes on from there.
"""

from collections.abc import Iterator

import pytest
import torch

from lowbit.algorithms.rtn import round_by_search, round_weight
from lowbit.calibration import Calibration
from lowbit.formats import as_format
from lowbit.grid import unpack
from lowbit.layers import packed_weights
from lowbit.options import AutoRoundOptions, AwqOptions, Options, RtnOptions, SmoothQuantOptions, TeqOptions
from lowbit.quantize import quantize_
from lowbit.recipe import recipe_named
from lowbit_assets import tiny_model_in_memory

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
IDS = torch.randint(3, 280, (32, 32), generator=torch.Generator().manual_seed(2))
TUNED = AutoRoundOptions(iterations=20)


def rounded(device: str, family: str, format: str, **recipe: object) -> tuple[float, torch.Tensor, list[str]]:
    """How far the logits of a model are moved by rounding it there, what they are then, and the notes of its report.

    Both are computed on the CPU, so that nothing but the rounding differs.
    """
    model = tiny_model_in_memory(family)
    chosen = recipe_named(format).replace(head=None, **recipe)
    with torch.no_grad():
        expected = model(IDS).logits
        model = model.to(device)
        calibration = Calibration(IDS) if chosen.asks_for_data else None
        report = quantize_(model, chosen, calibration=calibration, show_progress=False)
        assert all(tensor.device.type == device for tensor in model.state_dict().values())
        assert packed_weights(model)
        found = model.to("cpu")(IDS).logits
    notes = [layer.note for layer in report.layers]
    return float((found - expected).norm() / expected.norm()), found, notes


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("format", ["int4_g32", "int4_asym_g32", "int4_fine_g32", "int3_g32"])
def test_hqq_finds_the_same_grid(format: str, family: str) -> None:
    here, there = (rounded(device, family, format, rounder="hqq") for device in ("cpu", "cuda"))
    assert there[0] == pytest.approx(here[0], rel=0.02)
    assert float((there[1] - here[1]).norm() / here[1].norm()) < 0.2 * here[0]


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
@pytest.mark.parametrize(
    "scaler, options",
    [
        ("awq", AwqOptions(steps=8)),
        ("smoothquant", SmoothQuantOptions()),
        ("smoothquant", SmoothQuantOptions(search=False)),
        ("teq", TeqOptions(steps=20)),
    ],
)
def test_scalers_do_as_well(scaler: str, options: Options, family: str) -> None:
    runs = {
        device: rounded(
            device,
            family,
            "int3_g32",
            rounder="rtn",
            rounder_options=RtnOptions(),
            scaler=scaler,
            scaler_options=options,
        )
        for device in ("cpu", "cuda")
    }
    assert runs["cuda"][0] == pytest.approx(runs["cpu"][0], rel=0.1)
    # The same groups were scaled, and the same refused.
    told = {device: [note.split(":")[0] for note in run[2]] for device, run in runs.items()}
    assert told["cuda"] == told["cpu"] and scaler in told["cuda"]


@pytest.fixture
def only_repeatable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Operations whose sums may end differently from run to run raise."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("scaler, options", [("awq", AwqOptions(steps=8)), ("smoothquant", SmoothQuantOptions())])
def test_scalers_find_the_same_again_to_the_bit(scaler: str, options: Options, only_repeatable: None) -> None:
    """Heads share values in this family, so that channels share scales."""
    asked = {"rounder": "rtn", "rounder_options": RtnOptions(), "scaler": scaler, "scaler_options": options}
    runs = [rounded("cuda", "llama", "int3_g32", **asked) for _ in range(2)]
    assert torch.equal(runs[0][1], runs[1][1]) and runs[0][2] == runs[1][2]


@pytest.mark.parametrize("format", ["int4_g32", "int2_g32", "int3_asym_g32", "int4_fine_g32", "nf4", "q4_k"])
def test_a_weight_comes_back_without_its_codes_as_it_does_from_them(format: str) -> None:
    weight = torch.randn(64, 512, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    importance = torch.rand(512, device="cuda", generator=torch.Generator("cuda").manual_seed(1))
    for given in (None, importance):
        packed = round_weight(weight, as_format(format), importance=given)
        assert torch.equal(round_by_search(weight, as_format(format), given), unpack(packed))


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("format", ["int4_g32", "int2_asym_g32"])
def test_autoround_does_as_well(format: str, family: str) -> None:
    tuned = {"rounder": "autoround", "rounder_options": TUNED}
    here, there = (rounded(device, family, format, **tuned) for device in ("cpu", "cuda"))
    plain, *_ = rounded("cuda", family, format, rounder="plain_rtn")
    assert there[0] == pytest.approx(here[0], rel=0.1)
    assert there[0] < plain


def test_w8a8_of_smoothquant_does_as_well() -> None:
    runs = [rounded(device, "llama", "w8a8", rounder="rtn", scaler="smoothquant") for device in ("cpu", "cuda")]
    assert runs[1][0] == pytest.approx(runs[0][0], rel=0.1)
    assert float((runs[1][1] - runs[0][1]).norm() / runs[0][1].norm()) < runs[0][0]


def test_a_scaler_goes_with_a_rounder_that_tunes() -> None:
    both = {"rounder": "autoround", "rounder_options": TUNED, "scaler": "awq", "scaler_options": AwqOptions(steps=4)}
    here, there = (rounded(device, "llama", "int3_g32", **both) for device in ("cpu", "cuda"))
    assert there[0] == pytest.approx(here[0], rel=0.1)
