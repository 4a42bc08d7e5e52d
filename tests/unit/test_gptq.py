"""GPTQ as a function of a weight and its inputs."""

from dataclasses import replace

import pytest
import torch

from lowbit import AwqConfig, GPTQConfig
from lowbit.algorithms import ROUNDERS, SCALERS
from lowbit.algorithms.gptq import invert_factor, order_columns, round_gptq, turn_
from lowbit.algorithms.rtn import importance_of, relative_error, round_weight
from lowbit.algorithms.statistics import Statistics
from lowbit.cli import OK, main
from lowbit.errors import RecipeError
from lowbit.formats import as_format
from lowbit.grid import unpack
from lowbit.options import (
    AUTOROUND_RECIPES,
    ROUNDER_OPTIONS,
    SCALER_OPTIONS,
    AutoRoundOptions,
    GptqOptions,
    PlainOptions,
    RtnOptions,
    parse_options,
)
from lowbit.packing import PackedTensor
from lowbit.recipe import Recipe, recipe_named

OUT, IN = 48, 160
FORMATS = ["int4_g64", "int3_g32", "int2_asym_g32", "int4_channel", "int4_tensor", "int4_asym_g128", "int4_g256"]
FORMATS += ["int4_fine_g32", "int3_fine_channel", "int4_fine_tensor"]
FORMATS += ["nf4", "nf4_g64_dq", "mxfp4", "nvfp4", "fp8_e4m3", "int8_g32_bf16"]


def draw(seed: int = 0, rows: int = 400) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight, and inputs that depend on one another and differ in size, as those of a language model do."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(OUT, IN, generator=generator)
    mix = torch.randn(IN, IN, generator=generator) * 0.1 + torch.eye(IN)
    sizes = torch.randn(IN, generator=generator).exp()
    return weight, torch.randn(rows, IN, generator=generator) @ mix * sizes


def statistics_of(x: torch.Tensor, full: torch.Tensor | None = None) -> Statistics:
    found = Statistics(IN, "cpu", cross=full is not None)
    for part, other in zip(x.split(100), (x if full is None else full).split(100), strict=True):
        found.add_(part, None if full is None else other)
    return found


def output_error(weight: torch.Tensor, packed: PackedTensor, x: torch.Tensor) -> float:
    return float((x @ (weight - unpack(packed)).t()).square().mean())


@pytest.mark.parametrize("count", [1, 2, 255, 256, 257, 511, 513])
def test_a_matrix_is_turned_in_its_place(count: int) -> None:
    matrix = torch.arange(count * count, dtype=torch.float32).reshape(count, count)
    expected = matrix.flip(0, 1)
    turn_(matrix)
    assert torch.equal(matrix, expected)


def test_every_algorithm_has_its_options() -> None:
    assert set(ROUNDERS) == set(ROUNDER_OPTIONS)
    assert set(SCALERS) == set(SCALER_OPTIONS)


def test_statistics_are_means_over_all_rows() -> None:
    _, x = draw()
    found = statistics_of(x)
    assert found.tokens == 400
    assert torch.allclose(found.hessian, 2 / 400 * x.t() @ x, rtol=1e-4, atol=1e-4)
    assert torch.allclose(found.mean_square, x.square().mean(0), rtol=1e-4)
    assert torch.allclose(found.mean_size, x.abs().mean(0), rtol=1e-4)
    assert torch.equal(found.largest, x.abs().amax(0))
    weight = draw()[0]
    packed = round_weight(weight, as_format("int4_g64"))
    expected = 2 * OUT * output_error(weight, packed, x)
    assert found.output_error(weight, unpack(packed)) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("name", FORMATS)
def test_error_of_the_output_is_below_that_of_rtn(name: str) -> None:
    weight, x = draw()
    format = as_format(name)
    rounded = round_gptq(weight, format, statistics_of(x), GptqOptions())
    plain = output_error(weight, round_weight(weight, format), x)
    assert output_error(weight, rounded.packed, x) < 0.7 * plain
    assert rounded.packed.format == format and rounded.packed.order is None


@pytest.mark.parametrize(
    "options",
    [
        GptqOptions(order="none"),
        GptqOptions(static_groups=True),
        GptqOptions(order="activation", static_groups=True),
        GptqOptions(block_columns=1),
        GptqOptions(block_columns=1000),
        GptqOptions(damping=0.1),
    ],
)
def test_every_option_beats_rtn(options: GptqOptions) -> None:
    weight, x = draw()
    format = as_format("int3_g32")
    plain = output_error(weight, round_weight(weight, format), x)
    assert output_error(weight, round_gptq(weight, format, statistics_of(x), options).packed, x) < 0.7 * plain


def test_blocks_of_columns_change_nothing() -> None:
    weight, x = draw()
    codes = [
        round_gptq(weight, as_format("int4_g32"), statistics_of(x), GptqOptions(block_columns=n)).packed.codes
        for n in (1, 64, 1000)
    ]
    assert torch.equal(codes[0], codes[2]) and torch.equal(codes[0], codes[1])


def test_order_keeps_columns_in_their_groups() -> None:
    diagonal = torch.tensor([1.0, 3.0, 2.0, 9.0, 4.0, 5.0, 7.0])
    columns = order_columns(diagonal, as_format("int4_g3"), "group", static=False)
    assert columns.order.tolist() == [3, 5, 4, 6, 1, 2, 0]
    assert columns.segments == [(0, 3, 1), (3, 4, 2), (4, 7, 0)]
    mixed = order_columns(diagonal, as_format("int4_g3"), "activation", static=True)
    assert mixed.order.tolist() == [3, 6, 5, 4, 1, 2, 0]


@pytest.mark.parametrize("options", [GptqOptions(), GptqOptions(order="activation", static_groups=True)])
def test_in_whatever_order_columns_are_rounded_none_is_stored(options: GptqOptions) -> None:
    """Groups are the default order; what is stored is as if nothing had been reordered, so inference needs no index."""
    weight, x = draw()
    assert GptqOptions().order == "group"
    packed = round_gptq(weight, as_format("int4_g32"), statistics_of(x), options).packed
    assert packed.order is None and set(packed.tensors()) == {"codes", "scales"}


@pytest.mark.parametrize("name", ["int4_g32", "int3_asym_g32"])
def test_static_groups_have_their_scales_before_a_column_is_rounded(name: str) -> None:
    """So these do not depend on the order of columns, whatever it is; fitted as columns come they do."""
    weight, x = draw()
    orders = [GptqOptions(order="none"), GptqOptions(order="group")]
    grids = []
    for static in (True, False):
        chosen = [replace(options, static_groups=static) for options in orders]
        chosen += [GptqOptions(order="activation", static_groups=True)] if static else []
        packs = [round_gptq(weight, as_format(name), statistics_of(x), options).packed for options in chosen]
        grids.append([packed.scales for packed in packs])
        assert not torch.equal(packs[0].codes, packs[1].codes)
    assert all(torch.equal(scales, grids[0][0]) for scales in grids[0])
    assert not torch.equal(*grids[1])


def test_factor_is_that_of_the_inverse() -> None:
    _, x = draw()
    hessian = statistics_of(x).hessian
    factor, damping = invert_factor(hessian, 0.01)
    assert damping == 0.01
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(IN)
    assert torch.equal(factor, factor.triu())
    assert torch.allclose(factor.t() @ factor @ damped, torch.eye(IN), atol=1e-3)


def test_damping_rises_for_a_hessian_of_rank_one() -> None:
    weight, _ = draw()
    x = torch.randn(400, 1, generator=torch.Generator().manual_seed(1)) * torch.full((1, IN), 30.0)
    rounded = round_gptq(weight, as_format("int4_g32"), statistics_of(x), GptqOptions(damping=1e-6))
    assert bool(torch.isfinite(unpack(rounded.packed)).all())
    assert output_error(weight, rounded.packed, x) < output_error(
        weight, round_weight(weight, as_format("int4_g32")), x
    )
    uneven = x / 30 * torch.randn(1, IN, generator=torch.Generator().manual_seed(2)).exp() * 1e3
    noted = round_gptq(weight, as_format("int4_g32"), statistics_of(uneven), GptqOptions(damping=1e-6))
    assert noted.note.startswith("damping raised to ") and bool(torch.isfinite(unpack(noted.packed)).all())
    broken = torch.eye(8)
    broken[0, 1] = broken[1, 0] = 1.02  # no matrix of inner products, but within rounding of one
    _, damping = invert_factor(broken, 0.01)
    assert damping > 0.01


def test_inputs_that_are_always_zero_keep_their_weights() -> None:
    weight, x = draw()
    x[:, :40] = 0
    packed = round_gptq(weight, as_format("int4_g32"), statistics_of(x), GptqOptions()).packed
    error = (unpack(packed) - weight)[:, :40].norm() / weight[:, :40].norm()
    assert float(error) < 0.2


def test_correction_brings_the_output_nearer_to_that_in_full_precision() -> None:
    weight, full = draw()
    x = full + 0.3 * torch.randn(full.shape, generator=torch.Generator().manual_seed(5)) + 0.2 * full.roll(1, 1)
    format, statistics = as_format("int4_g32"), statistics_of(x, full)
    wanted = full @ weight.t()
    errors = []
    for correction in (0.0, 0.5, 1.0):
        packed = round_gptq(weight, format, statistics, GptqOptions(correction=correction)).packed
        errors.append(float((x @ unpack(packed).t() - wanted).square().mean()))
    assert errors[2] < errors[1] < errors[0]


def test_importance_moves_the_error_to_where_it_costs_least() -> None:
    weight, x = draw()
    format, statistics = as_format("int3_g32"), statistics_of(x)
    weighed = ROUNDERS["rtn"].round_weight(weight, format, statistics, RtnOptions()).packed
    assert output_error(weight, weighed, x) < 0.95 * output_error(weight, round_weight(weight, format), x)
    plain = ROUNDERS["rtn"].round_weight(weight, format, statistics, RtnOptions(importance=False)).packed
    assert torch.equal(plain.codes, round_weight(weight, format).codes)
    assert float(importance_of(statistics).min()) > 0


@pytest.mark.parametrize("largest", [1.2, 1.6, 2.2, 2.8, 3.4])
def test_at_two_bits_a_weight_of_little_importance_does_not_widen_the_step(largest: float) -> None:
    """Where the largest of a group lies at the short end of the range, its step is whatever share of it the others need."""
    codes = torch.randint(-2, 2, (16, 32), generator=torch.Generator().manual_seed(0)).float()
    codes[:, 0] = largest
    importance = torch.ones(32)
    importance[0] = 1e-3
    restored = unpack(round_weight(codes * 0.1, as_format("int2_g32"), importance=importance))
    torch.testing.assert_close(restored[:, 1:], codes[:, 1:] * 0.1, rtol=0.01, atol=0)


def test_a_clipped_weight_is_nearer_than_a_plain_one_and_needs_no_data() -> None:
    weight, _ = draw()
    weight[:, ::40] *= 4
    format = as_format("int3_g32")
    clipped = ROUNDERS["clip_rtn"].round_weight(weight, format, None, PlainOptions()).packed
    assert relative_error(weight, clipped) < 0.98 * relative_error(weight, round_weight(weight, format, "plain_rtn"))
    assert not Recipe(format, rounder="clip_rtn").uses_data


def test_formats_without_a_grid_are_refused() -> None:
    weight, x = draw()
    with pytest.raises(RecipeError, match="q4_k hides its own in blocks"):
        round_gptq(weight, as_format("q4_k"), statistics_of(x), GptqOptions())
    with pytest.raises(RecipeError, match="clip_rtn cannot shrink the scales of q4_k"):
        ROUNDERS["clip_rtn"].round_weight(weight, as_format("q4_k"), None, PlainOptions())


def test_options_that_contradict_one_another_or_are_out_of_range() -> None:
    with pytest.raises(RecipeError, match="static_groups=True"):
        GptqOptions(order="activation")
    with pytest.raises(RecipeError, match="no order 'sorted'"):
        GptqOptions(order="sorted")
    for wrong in ({"damping": 0.0}, {"correction": 1.5}, {"least_share": -0.1}, {"block_columns": 0}):
        with pytest.raises(RecipeError, match=next(iter(wrong))):
            GptqOptions(**wrong)
    with pytest.raises(RecipeError, match="gptq takes GptqOptions, and was given RtnOptions"):
        Recipe(as_format("int4"), rounder="gptq", rounder_options=RtnOptions())
    with pytest.raises(RecipeError, match="no scaler is called 'awk'"):
        Recipe(as_format("int4"), scaler="awk")
    with pytest.raises(ValueError, match="9 bits"):
        as_format("int4").replace(bits=9)


def test_recipe_keeps_its_options() -> None:
    recipe = recipe_named("int4_g64").replace(rounder="gptq", rounder_options=GptqOptions(damping=0.05))
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert recipe.to_dict()["rounder_options"]["damping"] == 0.05
    assert recipe.replace(rounder="rtn").rounder_options == RtnOptions()
    assert recipe.replace(name="other").rounder_options == GptqOptions(damping=0.05)
    assert Recipe.from_dict({"linear": "int4", "rounder": "gptq"}).rounder_options == GptqOptions()
    wrong = recipe.to_dict() | {"rounder_options": {"dampening": 1.0}}
    with pytest.raises(RecipeError, match="no option 'dampening': did you mean damping"):
        Recipe.from_dict(wrong)


def test_a_report_names_the_algorithms_of_its_recipe() -> None:
    """And tells the recipe int4 from the format int4 for every weight."""
    gptq = recipe_named("int4_g64").replace(rounder="gptq", scaler="awq")
    assert (recipe_named("int4").title, gptq.title) == ("int4", "int4_g64, gptq after awq")
    assert recipe_named("nf4").replace(rounder="hqq").title == "nf4, hqq"
    assert GPTQConfig().to_recipe().title == "GPTQConfig int4_g32"
    assert AwqConfig(bits=3).to_recipe().title == "AwqConfig int3_asym_g32"


def test_options_as_they_are_typed() -> None:
    texts = ["damping=0.1", "order=none", "static_groups=yes", "block_columns=32"]
    expected = GptqOptions(0.1, "none", True, block_columns=32)
    assert parse_options("algorithm", "gptq", texts, ROUNDER_OPTIONS) == expected
    for text, message in {
        "damping": "NAME=VALUE",
        "damping=much": "is a float",
        "drift=1": "no option 'drift'",
    }.items():
        with pytest.raises(RecipeError, match=message):
            parse_options("algorithm", "gptq", [text], ROUNDER_OPTIONS)
    with pytest.raises(RecipeError, match="belongs to a scaler"):
        parse_options("scaler", "", ["alpha=1"], SCALER_OPTIONS)


def test_recipes_of_autoround_as_they_are_typed(capsys: pytest.CaptureFixture[str]) -> None:
    for name, options in AUTOROUND_RECIPES.items():
        assert parse_options("algorithm", "autoround", [f"recipe={name}"], ROUNDER_OPTIONS) == options
    best = parse_options("algorithm", "autoround", ["batch_rows=4", "recipe=best"], ROUNDER_OPTIONS)
    assert best == AutoRoundOptions(iterations=1000, samples=512, batch_rows=4)
    with pytest.raises(RecipeError, match="autoround has no recipe 'bst': it has light, default, best"):
        parse_options("algorithm", "autoround", ["recipe=bst"], ROUNDER_OPTIONS)
    with pytest.raises(RecipeError, match="gptq has no option 'recipe'"):
        parse_options("algorithm", "gptq", ["recipe=best"], ROUNDER_OPTIONS)
    assert main(["quantize", "--help"]) == OK
    assert "autoround: recipe=light, default, best" in " ".join(capsys.readouterr().out.split())
