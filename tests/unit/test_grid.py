"""The grid: what rounding promises, and the same numbers from a definition in plain numpy.

Held here is the definition (`fit_grid`, `pack`, `unpack_by_definition`); other tests hold the compiled core to it.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit.algorithms.rtn import relative_error, round_weight
from lowbit.errors import WeightError
from lowbit.formats import FINE_BITS, FORMATS, LEVELS, ZERO_COUNTS, format_from_name
from lowbit.grid import (
    PLAIN,
    ScaleRounder,
    Search,
    check_finite,
    effective_scales,
    fit_grid,
    from_codes,
    group_weight,
    pack,
    quantize,
    to_codes,
    unpack,
    unpack_by_definition,
)
from lowbit.packing import PackedTensor
from lowbit.search import CLIP

INTEGERS = [f"int{bits}{asym}" for bits in range(2, 9) for asym in ("", "_asym")]
FINE = [f"int{bits}_fine" for bits in FINE_BITS]
TABLES = [f.name for f in FORMATS.values() if f.kind in ("codebook", "float")]
GROUPED = [*INTEGERS, *FINE, *TABLES]
VARIANTS = ["int4_g32", "int4_channel", "int4_tensor", "int4_asym_tensor_fp32", "int3_asym_g100_bf16", "nf4_channel",
            "fp8_e4m3_tensor_fp32", "w8a8"]  # fmt: skip


def random_weight(*shape: int, seed: int = 0, size: float = 0.05) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * size


def define(
    weight: torch.Tensor, name: str, search: Search = PLAIN, importance: torch.Tensor | None = None
) -> PackedTensor:
    """Pack by the definition, whatever the device has beside it."""
    format = format_from_name(name)
    return pack(weight, format, fit_grid(weight, format, search, importance))


def squared_error(weight: torch.Tensor, packed: PackedTensor, importance: torch.Tensor | None = None) -> float:
    """What a search makes least: errors weighed by the importance of their input, or by sqrt|w|."""
    error = (weight - unpack_by_definition(packed)).double().square()
    return float((error * (weight.abs().sqrt() if importance is None else importance)).sum())


def plain_numpy(row: np.ndarray, name: str) -> np.ndarray:
    """One group by the textbook: scale in fp16, nearest code, back. In loops, with nothing shared with grid.py."""
    format = format_from_name(name)
    if format.kind != "int":
        levels = sorted({v for v in LEVELS[format.table] if not math.isnan(v)})
        scale = float(np.float16(np.float32(np.abs(row).max()) / np.float32(max(levels))))
        return np.array([scale * min(levels, key=lambda v: abs(v - float(x) / scale)) for x in row])
    top = 2**format.bits - 1
    if format.symmetric:
        extreme = max(row, key=abs)
        scale, zero = float(np.float16(extreme / np.float32(-(2 ** (format.bits - 1))))), 2 ** (format.bits - 1)
    else:
        low, high = min(row.min(), 0), max(row.max(), 0)
        scale = float(np.float16(np.float32(high - low) / np.float32(top)))
        part = (top + 1) / ZERO_COUNTS if "fine" in name else 1
        zero = part * min(max(round(float(-low) / scale / part), 0), round((top + 1) / part) - 1)
        if "fine" in name:
            return np.array([scale * (min(max(round(float(x) / scale + zero), 0), top) - zero) for x in row])
    return np.array([scale * (min(max(round(float(x) / scale) + zero, 0), top) - zero) for x in row])


@pytest.mark.parametrize("name", [n for n in GROUPED if n not in ("mxfp4", "nvfp4")])
def test_the_textbook_gives_the_same(name: str) -> None:
    format = format_from_name(name).with_group(16)
    weight = random_weight(4, 40, seed=3)
    restored = unpack_by_definition(define(weight, format.name)).numpy()
    for row, ours in zip(weight.numpy(), restored, strict=True):
        expected = np.concatenate([plain_numpy(row[i : i + 16], name) for i in range(0, 40, 16)])
        # A weight within an fp32 rounding of a tie may fall to either side: allow one in the whole row.
        assert np.isclose(ours, expected, rtol=1e-5, atol=1e-9).sum() >= 39


@settings(max_examples=60)
@given(
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    group=st.sampled_from([-1, 0, 1, 7, 16, 32, 64]),
    experts=st.sampled_from([(), (2,)]),
    rows=st.integers(1, 5),
    columns=st.integers(1, 150),
    seed=st.integers(0, 99),
)
def test_integers_round_to_within_half_a_step(
    bits: int, symmetric: bool, group: int, experts: tuple[int, ...], rows: int, columns: int, seed: int
) -> None:
    format = format_from_name(f"int{bits}").replace(symmetric=symmetric, group_size=group)
    weight = random_weight(*experts, rows, columns, seed=seed)
    grid = fit_grid(weight, format)
    packed = pack(weight, format, grid)
    ones = torch.ones(weight.shape, dtype=torch.uint8)
    step = from_codes(ones, format, grid.scales, torch.zeros_like(grid.scales))
    zero = (from_codes(ones * 0, format, grid.scales, grid.zeros) / -step).round()
    position = weight / step + zero
    inside = (position >= -0.5) & (position <= format.max_code + 0.5)
    error = (weight - unpack_by_definition(packed)).abs()
    assert (error <= step.abs() * 0.5001)[inside].all()
    # Rounding the scale to fp16 moves the end of the range by so much: half a unit of its last place for each code.
    moved = format.max_code * torch.maximum(step.abs() * 2.0**-11, torch.tensor(2.0**-25))
    # The full symmetric range lacks the code beyond its positive end and clips there, by half a step more at most.
    assert (error <= step.abs() * (1.0 if symmetric else 0.5) * 1.0001 + moved).all()
    if symmetric:
        assert (position >= -0.5 - moved / step.abs() * 1.0001).all()


@pytest.mark.parametrize("name", TABLES)
def test_tables_round_to_the_nearest_level(name: str) -> None:
    format = format_from_name(name)
    weight = random_weight(5, 200)
    grid = fit_grid(weight, format)
    scales = (
        grid.scales if grid.scales.shape[-1] == 1 else grid.scales.repeat_interleave(format.group_size, -1)[:, :200]
    )
    levels = torch.tensor([v for v in format.levels if not math.isnan(v)])
    nearest = (weight.unsqueeze(-1) - scales.unsqueeze(-1) * levels).abs().amin(-1)
    error = (weight - unpack_by_definition(pack(weight, format, grid))).abs()
    assert torch.allclose(error, nearest, atol=1e-6 * float(weight.abs().max()))


@pytest.mark.parametrize("name", [*GROUPED, *VARIANTS])
def test_points_of_the_grid_are_exact(name: str) -> None:
    """Every value that codes can stand for comes back as it is, zero included."""
    format = format_from_name(name)
    size = 2 * len(format.levels) if format.levels else 2 << format.bits
    codes = torch.arange(size).remainder(1 << format.bits).to(torch.uint8)
    if format.levels:
        codes = codes[~torch.isnan(torch.tensor(format.levels))[codes.long()]]
    scales = torch.full((1, format.groups(len(codes))), 0.25)
    zeros = None if format.symmetric else torch.full_like(scales, 1)
    values = from_codes(codes[None], format, scales, zeros)
    again = to_codes(values, format, scales, zeros)
    assert torch.equal(from_codes(again, format, scales, zeros), values) and (values == 0).any()
    if format.kind == "int":
        assert torch.equal(again[0], codes)


@pytest.mark.parametrize("search", [PLAIN, Search(steps=6)])
@pytest.mark.parametrize("name", [*INTEGERS, *TABLES, *VARIANTS, "nf4_dq", "int4_dq", "int4_asym_dq"])
def test_zeros_are_exact(name: str, search: Search) -> None:
    weight = random_weight(6, 256)
    weight[:, ::3] = 0
    weight[2] = 0
    restored = unpack_by_definition(define(weight, name, search))
    assert torch.isfinite(restored).all() and not restored[:, ::3].any() and not restored[2].any()


@pytest.mark.parametrize("search", [PLAIN, Search(steps=6)])
@pytest.mark.parametrize("name", [*FINE, "int4_fine_dq", "int3_fine_g100_bf16"])
def test_fine_zeros_are_exact_where_all_of_a_group_is(name: str, search: Search) -> None:
    """Beside other weights a zero is rounded as they are: it need not lie on a code."""
    weight = random_weight(6, 256)
    weight[:, ::3] = 0
    weight[2] = 0
    packed = define(weight, name, search)
    restored = unpack_by_definition(packed)
    assert not restored[2].any() and restored[:, ::3].any()
    largest = effective_scales(packed)[weight.any(-1)].abs().max()
    assert restored[:, ::3].abs().max() <= largest * 0.51


def test_fine_zeros_lower_the_error_at_the_same_bits() -> None:
    weight = random_weight(32, 512) + 0.01
    for bits in FINE_BITS:
        for search in (PLAIN, Search()):
            fine, whole = (define(weight, f"int{bits}_{kind}_g32", search) for kind in ("fine", "asym"))
            assert fine.nbytes == whole.nbytes
            assert squared_error(weight, fine) < squared_error(weight, whole)


@pytest.mark.parametrize("name", [n for n in INTEGERS if "asym" not in n])
def test_the_extreme_weight_of_a_symmetric_group_comes_back(name: str) -> None:
    format = format_from_name(name).replace(scale_dtype="float32")
    weight = random_weight(8, 128)
    restored = unpack_by_definition(define(weight, format.name)).view(8, 2, 64)
    place = weight.view(8, 2, 64).abs().argmax(-1, keepdim=True)
    # -2^(bits-1) is a power of two, so the division that made the scale is undone without a rounding.
    assert torch.equal(restored.gather(-1, place), weight.view(8, 2, 64).gather(-1, place))


@pytest.mark.parametrize("name", [*GROUPED, *VARIANTS])
@pytest.mark.parametrize("weighted", [False, True])
def test_search_is_never_worse_than_plain(name: str, weighted: bool) -> None:
    importance = torch.exp(random_weight(200, seed=1, size=1.0)) if weighted else None
    weight = random_weight(8, 200, seed=2)
    plain = squared_error(weight, define(weight, name, PLAIN, importance), importance)
    for steps in (1, 8):
        assert (
            squared_error(weight, define(weight, name, Search(steps=steps), importance), importance) <= plain * 1.00001
        )


@settings(max_examples=40)
@given(name=st.sampled_from(GROUPED), seed=st.integers(0, 10**6), power=st.integers(-6, 3))
def test_search_is_never_worse_on_any_group(name: str, seed: int, power: int) -> None:
    format = format_from_name(name).with_group(16) if name not in ("mxfp4", "nvfp4") else format_from_name(name)
    # One group: a gain elsewhere cannot hide a loss.
    weight = random_weight(1, 16, seed=seed, size=10.0**power)
    plain = squared_error(weight, define(weight, format.name))
    assert squared_error(weight, define(weight, format.name, Search(steps=4))) <= plain * 1.00001 + 1e-30


@pytest.mark.parametrize("name", ["int4", "int3_asym", "int4_fine", "int2_fine", "nf4", "fp6"])
def test_search_pays(name: str) -> None:
    weight = random_weight(32, 512)
    assert squared_error(weight, define(weight, name, Search())) < 0.95 * squared_error(weight, define(weight, name))


@pytest.mark.parametrize("name", ["int4_g32", "int3_asym_channel", "int2_g64", "nf4", "int4_asym_tensor", "int4_fine"])
def test_mse_clip_is_the_best_of_its_scales(name: str) -> None:
    """The plain squared error of each group, of the covering scale shrunk to 80 parts of a hundred in steps of a half."""
    weight, format = random_weight(8, 192, seed=4), format_from_name(name)
    weight[:, 5] *= 6
    clipped = unpack(quantize(weight, format, CLIP))
    errors = []
    for step in range(41):
        ratio = 0.8 + 0.005 * step
        grid = fit_grid(weight * ratio, format)  # the covering scale of weights that are smaller
        errors.append(group_weight((weight - unpack(pack(weight, format, grid))).square(), format)[0].sum(-1))
    found = group_weight((weight - clipped).square(), format)[0].sum(-1)
    best = torch.stack(errors).amin(0)
    assert bool((found <= best * 1.002 + 1e-9).all()) and bool((found < errors[-1] * 0.999).any())
    plain = group_weight((weight - unpack(quantize(weight, format))).square(), format)[0].sum(-1)
    assert bool((found <= plain * 1.0001).all())


def test_importance_shifts_the_error_to_where_it_does_not_count() -> None:
    weight, importance = random_weight(32, 256), torch.ones(256)
    importance[::2] = 100
    blind, seeing = define(weight, "int3", Search()), define(weight, "int3", Search(), importance)
    assert squared_error(weight, seeing, importance) < squared_error(weight, blind, importance)
    assert squared_error(weight, blind) < squared_error(weight, seeing)


@pytest.mark.parametrize(("name", "wider"), [("int4_g64", True), ("int6_channel", True), ("int3_g64", False)])
def test_a_large_weight_that_little_comes_to_is_given_up(name: str, wider: bool) -> None:
    """From 4 bits on: with fewer the steps are too coarse for it to pay."""
    weight, importance = random_weight(32, 256), torch.ones(256)
    weight[:, ::64], importance[::64] = 2 * weight.abs().amax(), 1e-3
    narrow = squared_error(weight, define(weight, name, Search(), importance), importance)
    found = squared_error(weight, round_weight(weight, format_from_name(name), importance=importance), importance)
    assert found < 0.8 * narrow if wider else found == narrow


@pytest.mark.parametrize("name", ["int4", "int5_asym", "int4_fine", "nf4", "mxfp4", "nvfp4"])
def test_a_tail_group_is_a_group(name: str) -> None:
    group = format_from_name(name).group_size
    weight = random_weight(3, 2 * group + 5)
    weight[:, -5:] *= 1e-2
    # nvfp4's factor for the whole tensor comes from the largest weight, which must be the same in both.
    whole = define(weight, name)
    head, tail = define(weight[:, : 2 * group], name), define(weight[:, 2 * group :], name)
    assert torch.equal(unpack_by_definition(whole)[:, : 2 * group], unpack_by_definition(head))
    if name != "nvfp4":
        assert torch.equal(unpack_by_definition(whole)[:, 2 * group :], unpack_by_definition(tail))
    assert whole.scales.shape == (3, 3)


def test_per_channel_and_per_tensor() -> None:
    weight = random_weight(2, 4, 96)
    channel, tensor = define(weight, "int8_channel"), define(weight, "int8_tensor")
    assert channel.scales.shape == (2, 4, 1) and tensor.scales.shape == (2, 1, 1)
    extreme = weight.abs().amax(-1, keepdim=True) / 128
    assert torch.allclose(channel.scales.float().abs(), extreme, rtol=1e-3)
    assert torch.allclose(tensor.scales.float().abs(), extreme.amax(1, keepdim=True), rtol=1e-3)
    assert torch.equal(unpack_by_definition(define(weight[1], "int8_tensor")), unpack_by_definition(tensor)[1])


@pytest.mark.parametrize("name", ["nf4", "int4", "int4_asym", "int4_fine", "int8"])
def test_double_quantisation_costs_little(name: str) -> None:
    weight = random_weight(16, 1024) * torch.linspace(0.5, 2, 16)[:, None]
    weight[3, 64:192] = 0
    twice = define(weight, f"{name}_dq")
    assert twice.scales.dtype == torch.uint8 and twice.scale_scales.shape == (1,) and twice.scale_offset.shape == (1,)
    # Codes are chosen against the scales that are read back, so even the zero groups do not stretch the second level.
    assert squared_error(weight, twice) < 1.3 * squared_error(weight, define(weight, name))


def test_double_quantisation_reads_each_block_with_its_own_step() -> None:
    weight = random_weight(10, 64 * 60)
    packed = define(weight, "nf4_dq")
    assert packed.scale_scales.shape == (3,)
    codes = packed.scales.flatten().float() - 128
    steps = packed.scale_scales.repeat_interleave(256)[:600]
    expected = (codes * steps + packed.scale_offset).view(10, 60)
    assert torch.equal(effective_scales(packed), expected)
    largest = weight.view(10, 60, 64).abs().amax(-1)
    assert ((expected - largest).abs() <= steps.view(10, 60) * 0.51 + 1e-4).all()


def test_mxfp4_scales_are_powers_of_two() -> None:
    weight = torch.tensor([[6.0, 7.25, 7.3, 12.0, 0.0, 1e-39, 3e38, 3.0]]).T.repeat(1, 32)
    packed = define(weight, "mxfp4")
    assert packed.scales.dtype == torch.uint8
    assert packed.scales.flatten().tolist()[:4] == [127, 127, 128, 128]
    assert packed.scales.flatten().tolist()[4:6] == [0, 0]
    restored = unpack_by_definition(packed)
    assert torch.isfinite(restored).all() and restored[0, 0] == 6 and restored[3, 0] == 12 and restored[7, 0] == 3
    assert restored[5, 0] <= 1e-38


def test_eight_bit_exponents_round_to_the_nearest_power() -> None:
    rounder = ScaleRounder(format_from_name("mxfp4"), None)
    scales = torch.tensor([1.0, 1.49, 1.5, 1.9, 0.26, -3.1, 0.0])
    assert rounder(scales).tolist() == [1.0, 1.0, 2.0, 2.0, 0.25, 4.0, 2.0**-127]
    powers = torch.exp2(torch.arange(-127, 128).float())
    assert torch.equal(rounder(powers), powers)


def test_nvfp4_scales_are_small_floats_under_one_factor() -> None:
    weight = random_weight(4, 160)
    packed = define(weight, "nvfp4")
    assert packed.scales.dtype == torch.uint8 and packed.scale_scales.shape == (1,)
    assert float(packed.scale_scales) == pytest.approx(float(weight.abs().max()) / (448 * 6))
    read = packed.scales.view(torch.float8_e4m3fn).float()
    assert torch.equal(effective_scales(packed), read * packed.scale_scales) and float(read.max()) == 448
    wanted = weight.view(4, 10, 16).abs().amax(-1) / 6
    assert torch.allclose(effective_scales(packed), wanted, rtol=2**-4)


@pytest.mark.parametrize(("table", "dtype"), [("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)])
def test_fp8_codes_are_the_bits_of_torch(table: str, dtype: torch.dtype) -> None:
    format = format_from_name(f"fp8_{table}_tensor_fp32")
    weight = random_weight(16, 64)
    packed = define(weight, format.name)
    scale = effective_scales(packed)
    theirs = (weight / scale).to(dtype).float() * scale
    # torch breaks ties to even and we to the lower level: none of these weights is a tie.
    assert torch.equal(unpack_by_definition(packed), theirs)


@pytest.mark.parametrize("name", ["int4", "int4_asym", "nf4", "int8"])
def test_scales_beyond_fp16_saturate(name: str) -> None:
    restored = unpack_by_definition(define(torch.full((1, 64), 1e8), name))
    assert torch.isfinite(restored).all() and (restored > 6e4).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_any_type(dtype: torch.dtype) -> None:
    weight = random_weight(4, 128).to(dtype)
    packed = define(weight, "int4")
    assert torch.equal(packed.codes, define(weight.float(), "int4").codes)
    assert unpack(packed, torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("name", [*GROUPED, *VARIANTS, "nf4_dq"])
def test_quantize_is_fit_and_pack(name: str) -> None:
    weight = random_weight(6, 200)
    packed = quantize(weight, format_from_name(name), Search(steps=4))
    expected = define(weight, name, Search(steps=4))
    assert packed.format == expected.format and packed.tensors().keys() == expected.tensors().keys()
    # Sums in another order may take another candidate of the same worth: the errors agree, single codes need not.
    assert squared_error(weight, packed) == pytest.approx(squared_error(weight, expected), rel=1e-2)
    assert torch.equal(unpack(packed), unpack_by_definition(packed))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_weights_that_are_no_numbers_are_refused(bad: float) -> None:
    weight = torch.zeros(3, 5)
    check_finite(weight, "layer.weight")
    weight[1, 2] = bad
    with pytest.raises(WeightError, match=r"layer\.weight holds 1 values .*\[1, 2\]"):
        check_finite(weight, "layer.weight")


def test_large_weights_are_not_mistaken_for_infinite_ones() -> None:
    check_finite(torch.full((4, 4), 3e38), "layer.weight")
    assert not math.isfinite(float(torch.full((4, 4), 3e38).sum()))


@pytest.mark.parametrize(
    "name", ["int4", "int3_asym_g32", "nf4", "int8_channel", "mxfp4", "q4_k", "int4_dq", "fp8_e4m3_tensor_fp32"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_reported_error_is_the_distance_of_the_weights(name: str, dtype: torch.dtype) -> None:
    weight = random_weight(9, 301, seed=5).to(dtype)
    packed = quantize(weight, format_from_name(name))
    expected = float((unpack(packed) - weight.float()).norm() / weight.float().norm())
    for same in (weight, weight.T.contiguous().T):
        assert abs(relative_error(same, packed) - expected) < 1e-5 * expected
