"""Half-quadratic rounding: its objective is never worse than that of round-to-nearest, whatever the format."""

from __future__ import annotations

import pytest
import torch

from lowbit.algorithms.hqq import round_hqq
from lowbit.algorithms.rtn import relative_error, round_weight
from lowbit.bits import spread_groups
from lowbit.errors import RecipeError
from lowbit.formats import as_format
from lowbit.grid import effective_scales, group_weight, unpack
from lowbit.options import HqqOptions
from lowbit.packing import PackedTensor
from lowbit.quantize import quantize_
from lowbit.recipe import recipe_named
from lowbit_assets import tiny_model_in_memory

FORMATS = [
    "int2", "int3_g32", "int4", "int8", "int2_asym", "int4_asym_g32", "int3_asym_channel", "int4_asym_tensor",
    "int4_asym_g50", "int4_dq", "nf4", "mxfp4", "nvfp4",
]  # fmt: skip


def heavy_tailed(rows: int = 12, columns: int = 192, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * 0.02 + 0.003
    weight[torch.rand(rows, columns, generator=generator) < 0.02] *= 5
    return weight


def distances(weight: torch.Tensor, packed: PackedTensor, power: float) -> torch.Tensor:
    """sum |w - w^|^p of each group."""
    groups, _ = group_weight(weight - unpack(packed), packed.format)
    return groups.abs().pow(power).sum(-1)


@pytest.mark.parametrize("name", FORMATS)
def test_the_objective_is_never_worse_than_that_of_rounding_to_nearest(name: str) -> None:
    weight, format = heavy_tailed(), as_format(name)
    ours = distances(weight, round_hqq(weight, format), 0.7)
    for rounder in ("rtn", "plain_rtn"):
        theirs = distances(weight, round_weight(weight, format, rounder), 0.7)
        assert float(ours.sum()) <= float(theirs.sum()) * (1 + 1e-6)
        if not format.scale_block:
            assert bool((ours <= theirs * (1 + 1e-5)).all())


def errors_near_zero(weight: torch.Tensor, packed: PackedTensor, power: float = 0.7) -> torch.Tensor:
    """sum m (w - w^)^2 of each group, m = (|w| / s + 1/4)^(p - 2), s being the scale that covers the group."""
    scales = effective_scales(round_weight(weight, packed.format.replace(scale_block=0), "plain_rtn"))
    m = (weight.abs() / spread_groups(scales, packed.format, weight.shape[-1]) + 0.25).pow(power - 2)
    return group_weight(m * (weight - unpack(packed)).square(), packed.format)[0].sum(-1)


@pytest.mark.parametrize("name", ["int4_fine", "int3_fine_g50", "int2_fine_channel", "int5_fine_g32", "int4_fine_dq"])
def test_fine_zeros_are_never_worse_than_those_of_plain_rounding_fine_or_whole(name: str) -> None:
    weight, format = heavy_tailed(), as_format(name)
    ours = errors_near_zero(weight, round_hqq(weight, format))
    for other in (format, format.replace(fine_zeros=False)):
        theirs = errors_near_zero(weight, round_weight(weight, other, "plain_rtn"))
        assert float(ours.sum()) <= float(theirs.sum()) * (1 + 1e-5)
        if not format.scale_block:
            assert bool((ours <= theirs * (1 + 1e-5)).all())


def test_fine_zeros_beat_whole_ones_at_the_same_bits() -> None:
    weight = heavy_tailed(64, 256)
    for bits in (2, 3, 4, 5):
        fine, whole = (round_hqq(weight, as_format(f"int{bits}_{kind}_g32")) for kind in ("fine", "asym"))
        assert fine.nbytes == whole.nbytes
        assert errors_near_zero(weight, fine).sum() < 0.97 * errors_near_zero(weight, whole).sum()


@pytest.mark.parametrize("name", ["int2_g32", "int3_g32", "int4", "int4_asym", "int2_asym_g32", "int3_asym"])
@pytest.mark.parametrize("outliers", [False, True])
def test_weights_are_nearer_than_rounded_plainly(name: str, outliers: bool) -> None:
    """Not only by its own objective, which would gladly lose the large weights: the scale is held within reach of them."""
    weight = heavy_tailed(64, 256)
    if not outliers:
        weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(4)) * 0.03
    ours, plain = round_hqq(weight, as_format(name)), round_weight(weight, as_format(name), "plain_rtn")
    assert relative_error(weight, ours) < relative_error(weight, plain)


def test_without_a_reach_large_weights_are_lost() -> None:
    weight, format = heavy_tailed(64, 256), as_format("int4_asym")
    held, lost = round_hqq(weight, format), round_hqq(weight, format, HqqOptions(reach=0.0))
    assert relative_error(weight, held) < relative_error(weight, lost)
    assert distances(weight, lost, 0.7).sum() < distances(weight, held, 0.7).sum()


def test_turns_better_the_start() -> None:
    weight, format = heavy_tailed(), as_format("int3_asym")
    none = distances(weight, round_hqq(weight, format, HqqOptions(iterations=0)), 0.7).sum()
    some = distances(weight, round_hqq(weight, format, HqqOptions(iterations=2)), 0.7).sum()
    many = distances(weight, round_hqq(weight, format), 0.7).sum()
    assert many <= some < none


def test_weights_on_the_grid_stay_there() -> None:
    codes = torch.randint(0, 8, (6, 64), generator=torch.Generator().manual_seed(2))
    codes[:, :2] = torch.tensor([0, 7])
    weight = (codes - 3) * 0.25
    for name in ("int3_asym", "int3_fine"):
        assert torch.equal(unpack(round_hqq(weight, as_format(name))), weight)


def test_zeros_and_experts() -> None:
    weight = torch.stack([torch.zeros(4, 96), heavy_tailed(4, 96)])
    packed = round_hqq(weight, as_format("int4_asym_g32"))
    restored = unpack(packed)
    assert packed.shape == (2, 4, 96) and not restored[0].any()
    assert torch.equal(restored[1], unpack(round_hqq(weight[1], as_format("int4_asym_g32"))))


def test_what_it_cannot_do_is_refused() -> None:
    with pytest.raises(RecipeError, match="hqq cannot fit q4_k"):
        round_hqq(heavy_tailed(), as_format("q4_k"))
    with pytest.raises(RecipeError, match="a power of 2"):
        HqqOptions(power=2)
    with pytest.raises(RecipeError, match="growth at least 1"):
        HqqOptions(growth=0.5)


def test_a_model_is_rounded_by_the_recipe() -> None:
    model = tiny_model_in_memory("llama")
    weight = model.model.layers[0].mlp.up_proj.weight.detach().clone()
    options = HqqOptions(iterations=3)
    quantize_(model, recipe_named("int3_asym_g32").replace(rounder="hqq", rounder_options=options))
    packed = model.model.layers[0].mlp.up_proj.packed_weight.packed()
    expected = round_hqq(weight, as_format("int3_asym_g32"), options)
    assert torch.equal(unpack(packed), unpack(expected))
    assert not torch.equal(unpack(packed), unpack(round_weight(weight, as_format("int3_asym_g32"))))


def test_a_row_with_one_fine_zero_point_gets_a_whole_one() -> None:
    weight = torch.randn(24, 160, generator=torch.Generator().manual_seed(0))
    fine, whole = (unpack(round_hqq(weight, as_format(f"int4_{zeros}_channel"))) for zeros in ("fine", "asym"))
    assert torch.equal(fine, whole)
