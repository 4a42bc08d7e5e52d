"""The compiled core's rounding against its definition in `grid`: bit for bit, ties and borders between levels included."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit.algorithms.rtn import relative_error
from lowbit.formats import Format, as_format
from lowbit.grid import Search, fit_grid, pack, quantize, unpack

FLOATS = ["fp4_e2m1", "fp6", "fp6_e3m2", "fp8_e4m3", "fp8_e5m2"]
SEARCHED = Search()


def borders(format: Format) -> torch.Tensor:
    """Every level, what lies midway between two neighbours, and the numbers next to that, of either sign."""
    levels = torch.unique(torch.tensor([level for level in format.levels if level == level]))
    middles = (levels[1:] + levels[:-1]) / 2
    up, down = (torch.nextafter(middles, torch.full_like(middles, end)) for end in (torch.inf, -torch.inf))
    return torch.cat([levels, middles, up, down])


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("power", [-9, 0, 5])
def test_every_border_of_a_small_float_rounds_as_the_definition(name: str, power: int) -> None:
    """The largest level is in every group, so that its scale is the power of two and every border is met exactly."""
    format = as_format(name).replace(group_size=64, scale_dtype="float32")
    values = borders(format)
    values = torch.nn.functional.pad(values, (0, -len(values) % 63)).view(-1, 63)
    weight = torch.cat([torch.full((len(values), 1), format.max_level), values], dim=1).reshape(1, -1) * 2.0**power
    packed = quantize(weight, format)
    assert bool((packed.scales == 2.0**power).all())
    assert torch.equal(packed.codes, pack(weight, format, fit_grid(weight, format)).codes)


@pytest.mark.parametrize(
    "name", [*FLOATS, "nvfp4", "mxfp4", "nf4", "int4", "int3_asym_g32", "int4_fine", "int2_fine_g24_fp32", "int8_bf16"]
)
@settings(max_examples=10)
@given(st.integers(0, 2**16), st.one_of(st.floats(1e-6, 1e3), st.floats(1e5, 1e12)))
def test_codes_and_scales_equal_the_definition(name: str, seed: int, size: float) -> None:
    format = as_format(name)
    weight = torch.randn(3, 130, generator=torch.Generator().manual_seed(seed)) * size
    packed, defined = quantize(weight, format), pack(weight, format, fit_grid(weight, format))
    for part, tensor in defined.tensors().items():
        assert torch.equal(packed.tensors()[part].view(torch.uint8), tensor.view(torch.uint8)), part


@pytest.mark.parametrize("name", FLOATS)
def test_a_search_keeps_the_scales_of_the_definition(name: str) -> None:
    format, weight = as_format(name), torch.randn(40, 256, generator=torch.Generator().manual_seed(1))
    packed, defined = quantize(weight, format, SEARCHED), pack(weight, format, fit_grid(weight, format, SEARCHED))
    # Sums run in another order, so that of two candidates as good as each other the other one may be taken.
    assert (packed.scales != defined.scales).float().mean() < 0.02


@pytest.mark.parametrize(
    "name", ["int4_g128", "int4_asym_g32", "int3_g64", "int3_asym_g24", "int2_g64", "int4_channel", "int4_g50"]
)
def test_integers_of_few_bits_are_chosen_as_well_as_by_the_definition(name: str) -> None:
    """Most candidates are ranked in whole numbers, where the processor has them: what is chosen is as good to 1e-4 of the error.

    Rows reach from 1e-4 to 1e4, one of them and one group more are zero, and one weight of another is a thousand times the others.
    """
    format, draw = as_format(name), torch.Generator().manual_seed(4)
    weight = torch.randn(37, 300, generator=draw) * torch.logspace(-4, 4, 37)[:, None]
    weight[5] = weight[6, :128] = 0.0
    weight[7, 40] *= 1000
    packed, defined = quantize(weight, format, SEARCHED), pack(weight, format, fit_grid(weight, format, SEARCHED))
    assert (packed.scales != defined.scales).float().mean() < 0.01
    for row, ours, theirs in zip(weight, unpack(packed), unpack(defined), strict=True):
        mask = row.abs().sqrt()
        error, expected = ((mask * (found - row).square()).sum() for found in (ours, theirs))
        assert error <= 1.0001 * expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["int4_g32", "int8_g64", "nf4", "int3_asym_g48"])
def test_whole_groups_are_those_of_the_definition(name: str, dtype: torch.dtype) -> None:
    """Sixteen groups that are all there are brought into lanes in blocks; here they begin in one row and end in another."""
    format = as_format(name)
    weight = torch.randn(30, 2 * 192, generator=torch.Generator().manual_seed(5)).to(dtype)[:, 64:256]
    packed, defined = quantize(weight, format), pack(weight, format, fit_grid(weight, format))
    assert torch.equal(packed.codes, defined.codes) and torch.equal(packed.scales, defined.scales)


@pytest.mark.parametrize("name", ["int4_asym_g32", "int3_asym_g64", "int2_asym_g32"])
def test_a_search_rounds_middles_as_a_division_does(name: str) -> None:
    """No weight is divided by a candidate. Each of these is the middle of two codes under the one scale that is tried, or the
    number next to it, so that a quotient one bit away is another code, and the codes make another scale."""
    format, search = as_format(name), Search(1.0, 1.0, steps=1, zero_steps=0)
    draw = torch.Generator().manual_seed(3)
    scales = (0.1 + torch.rand(64, 1, generator=draw)).half().float() / 16
    highest = 2**format.bits - 1
    middles = (torch.randint(0, highest, (len(scales), format.group_size - 2), generator=draw) + 0.5) * scales
    middles = torch.nextafter(middles, middles + torch.randint(-1, 2, middles.shape, generator=draw))
    weight = torch.cat([torch.tensor([[0.0, highest]]) * scales, middles], dim=1).reshape(8, -1)
    packed, defined = quantize(weight, format, search), pack(weight, format, fit_grid(weight, format, search))
    assert (defined.scales.flatten() != scales.half().flatten()).float().mean() > 0.9
    assert (packed.scales != defined.scales).float().mean() < 0.02


@pytest.mark.parametrize("view", ["expanded", "overlapping", "one row", "columns"])
def test_rows_that_share_memory_are_read_as_they_are(view: str) -> None:
    made = torch.randn(300, generator=torch.Generator().manual_seed(2))
    weight = {
        "expanded": made[:64].expand(5, 64),
        "overlapping": made.unfold(0, 64, 16),
        "one row": made[:64].expand(1, 64),
        "columns": made.view(4, 75)[:, 5:69],
    }[view]
    packed, expected = quantize(weight, as_format("int4")), quantize(weight.clone(), as_format("int4"))
    assert torch.equal(packed.codes, expected.codes) and torch.equal(packed.scales, expected.scales)
    assert relative_error(weight, packed) == pytest.approx(relative_error(weight.clone(), packed))
