"""Weights as places in a table: what is written, that nothing nearer was to be had, and whose table fits best."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lowbit.errors import RecipeError
from lowbit.openvino import (
    AdvancedCompressionParameters,
    CompressWeightsMode,
    codebooks,
    compress_weights,
    compression_report,
)
from lowbit.openvino.codebooks import CB4, Codebook, place
from lowbit.openvino.library import core, ov
from lowbit.openvino.modes import AdaptiveCodebookParams
from lowbit.openvino.sites import low_bit_weights
from unit.test_openvino_compress import error, graph, product, run, written

Mode = CompressWeightsMode
TERNARY = (-1.0, 0.0, 1.0)
WIDE = tuple(np.linspace(-1, 1, 40).astype(np.float32).tolist())


def table(levels: Any) -> AdvancedCompressionParameters:
    return AdvancedCompressionParameters(codebook=levels)


def constants(model: Any) -> dict[str, Any]:
    return {node.get_friendly_name(): node for node in model.get_ops() if node.get_type_name() == "Constant"}


# What is asked for: the name in the report, the types of places and levels, and the most that outputs may move by.
ASKED = [
    ({"mode": Mode.CB4}, "cb4_g32", "u4", "f8e4m3", 0.02),
    ({"mode": Mode.CB4_F8E4M3}, "cb4_g32", "u4", "f8e4m3", 0.02),
    ({"mode": Mode.ADAPTIVE_CODEBOOK}, "adaptive16_g32", "u4", "f8e4m3", 0.02),
    ({"mode": Mode.CODEBOOK, "advanced_parameters": table(TERNARY)}, "codebook3_g32", "u4", "f8e4m3", 0.1),
    ({"mode": Mode.CODEBOOK, "advanced_parameters": table(WIDE)}, "codebook40_g32", "u8", "f32", 0.01),
]


@pytest.mark.parametrize(("asked", "name", "places", "levels", "most"), ASKED)
def test_every_table_has_its_types_also_from_disk(
    asked: dict[str, Any], name: str, places: str, levels: str, most: float, tmp_path: Path
) -> None:
    made = written(compress_weights(graph(), group_size=32, **asked), tmp_path)
    report = compression_report(made)
    assert report.formats() == {name: 11, "int8_asym_channel": 4}
    row = next(row for row in report.layers if row.format == name)
    found = constants(made)
    assert found[f"{row.path}.weight"].get_element_type().to_string() == places
    assert found[f"{row.path}.levels"].get_element_type().to_string() == levels
    assert (
        row.error > 0 and "nf4" in row.note and row.bytes_after < row.bytes_before * (0.15 if places == "u4" else 0.3)
    )
    assert 0 < error(made) < most
    assert len(low_bit_weights(made)) == 15
    with pytest.raises(RecipeError, match="15 weights of this model are low-bit already"):
        compress_weights(made, Mode.INT4_SYM)


@pytest.mark.parametrize("book", [Codebook("cb4", 32, CB4), Codebook("mine", 64, WIDE), Codebook("own", -1)])
def test_the_graph_says_what_was_rounded_and_nothing_is_nearer(book: Codebook) -> None:
    weight = torch.randn(48, 128, generator=torch.Generator().manual_seed(1))
    weight[3] = 0
    placed = place(weight, book)
    levels = placed.levels.double()
    groups = weight.view(placed.index.shape).double()
    values = levels[placed.index.long()] * placed.scales.double()
    nearest = (levels[:, None, None, None] * placed.scales.double() - groups).abs().amin(0)
    torch.testing.assert_close((values - groups).abs(), nearest, rtol=0, atol=1e-6)
    assert not placed.restored()[3].any() and len(levels.unique()) == len(levels)
    modes = {"cb4": (Mode.CB4, {}), "mine": (Mode.CODEBOOK, {"advanced_parameters": table(WIDE)})}
    mode, more = modes.get(book.label, (Mode.ADAPTIVE_CODEBOOK, {}))
    made = compress_weights(product(weight.numpy()), mode, group_size=book.group_size, all_layers=True, **more)
    layers = core().compile_model(made, "CPU", {}).get_runtime_model().get_ordered_ops()
    assert "Gather" not in {
        layer.get_rt_info()["layerType"].value for layer in layers
    }  # done once, when it is compiled
    found = run(made, {"x": np.eye(128, dtype=np.float32)}).T
    np.testing.assert_allclose(found, placed.restored().numpy(), rtol=1e-6, atol=0)


def test_a_table_of_its_own_fits_a_weight_better() -> None:
    """Numbers around three places, none of which another table has."""
    draw = torch.Generator().manual_seed(0)
    centres = torch.tensor([-0.3, 0.4, 0.9])[torch.randint(3, (64, 256), generator=draw)]
    weight = centres + 0.02 * torch.randn(64, 256, generator=draw)

    def left(book: Codebook) -> float:
        return float((place(weight, book).restored() - weight).norm() / weight.norm())

    own, fixed = left(Codebook("own", 128)), left(Codebook("cb4", 128, CB4))
    assert own < 0.5 * fixed < 0.1
    assert left(Codebook("own", 128, count=3)) < 2 * 0.02 / float(centres.square().mean().sqrt())


def test_a_table_is_fitted_to_all_columns_of_a_large_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every fourth group lies otherwise: numbers of either sign in it, and of three sizes in the others."""
    monkeypatch.setattr(codebooks, "_SAMPLE", 1 << 14)
    draw = torch.Generator().manual_seed(0)
    groups = torch.tensor([-0.3, 0.4, 0.9])[torch.randint(3, (256, 8, 32), generator=draw)]
    groups[:, ::4] = torch.tensor([-1.0, 1.0])[torch.randint(2, (256, 2, 32), generator=draw)]
    weight = groups.flatten(1)
    assert (place(weight, Codebook("own", 32)).restored() - weight).norm() < 0.03 * weight.norm()


def test_a_weight_of_zeros_stays_one() -> None:
    assert not place(torch.zeros(8, 64), Codebook("own", 32)).restored().any()


def test_what_the_model_is_given_decides() -> None:
    generator = np.random.default_rng(0)
    weight = generator.standard_normal((96, 128)).astype(np.float32)
    loud = np.exp(generator.standard_normal(128)) ** 2
    data = [(generator.standard_normal((512, 128)) * loud).astype(np.float32) for _ in range(2)]

    def left(mode: CompressWeightsMode, **keywords: Any) -> float:
        made = compress_weights(product(weight), mode, group_size=64, all_layers=True, **keywords)
        return float(np.linalg.norm(run(made, {"x": data[0]}) - data[0] @ weight.T))

    for mode in (Mode.CB4, Mode.ADAPTIVE_CODEBOOK):
        assert left(mode, dataset=data) < 0.95 * left(mode)
        assert left(mode, dataset=data, scale_estimation=False) == left(mode)
    rows = compression_report(compress_weights(graph(), Mode.CB4, ratio=0.5, group_size=32)).layers
    assert {row.format for row in rows} == {"cb4_g32", "int8_asym_channel"}


def test_tables_of_other_makers_are_read() -> None:
    tensor = ov.Tensor(np.array([1, 0, -1], np.float32))
    made = compress_weights(graph(), Mode.CODEBOOK, group_size=32, advanced_parameters=table(tensor))
    assert compression_report(made).formats()["codebook3_g32"] == 11


REFUSED = {
    "CODEBOOK rounds to a table of your own": {"mode": Mode.CODEBOOK},
    "2 to 256 different finite numbers, and this one 1": {
        "mode": Mode.CODEBOOK,
        "advanced_parameters": table([1.0, 1.0]),
    },
    "different finite numbers, and this one 2": {"mode": Mode.CODEBOOK, "advanced_parameters": table([1.0, np.nan])},
    "gptq rounds to numbers that stand evenly": {"mode": Mode.CB4, "gptq": True, "dataset": [1]},
    "across_blocks shares a table among layers": {
        "mode": Mode.ADAPTIVE_CODEBOOK,
        "advanced_parameters": AdvancedCompressionParameters(
            adaptive_codebook_params=AdaptiveCodebookParams(across_blocks=True)
        ),
    },
    "tables of 1 numbers in f8e4m3": {
        "mode": Mode.ADAPTIVE_CODEBOOK,
        "advanced_parameters": AdvancedCompressionParameters(
            adaptive_codebook_params=AdaptiveCodebookParams(num_elements=1)
        ),
    },
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_what_cannot_be_is_one_sentence(sentence: str) -> None:
    with pytest.raises(RecipeError, match=sentence):
        compress_weights(graph(), **REFUSED[sentence])
