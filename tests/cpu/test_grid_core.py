"""Rounding in the compiled core with an importance of the inputs: the definition's numbers, on every instruction set."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from lowbit.core import calls
from lowbit.errors import KernelError, WeightError
from lowbit.formats import format_from_name
from lowbit.grid import Search, fit_grid, pack, quantize, unpack
from lowbit.grid_core import core_quantize
from lowbit.packing import PackedTensor

NAMES = [
    "int2",
    "int3_asym_g32",
    "int4",
    "int4_asym",
    "int4_g24",
    "int4_channel",
    "int6_g64",
    "int8",
    "nf4",
    "fp4",
    "fp8_e4m3",
    "mxfp4",
]
SEARCH = Search(steps=8)


def instruction_sets() -> list[str]:
    names = []
    for name in ("avx512", "avx2", "portable"):
        try:
            calls.set_instruction_set(name)
        except KernelError:
            continue
        names.append(name)
    calls.set_instruction_set(None)
    return names


@pytest.fixture(params=instruction_sets(), autouse=True)
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    calls.set_instruction_set(request.param)
    yield request.param
    calls.set_instruction_set(None)


def drawn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def case(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight whose width leaves a tail, and inputs whose importances span four orders of magnitude."""
    return (drawn(7, 203, seed=3) * 0.05).to(dtype), torch.exp(2 * drawn(203, seed=4))


def weighed_error(weight: torch.Tensor, packed: PackedTensor, importance: torch.Tensor) -> float:
    return float(((weight.float() - unpack(packed)).double().square() * importance).sum())


def by_core(weight: torch.Tensor, name: str, importance: torch.Tensor | None) -> PackedTensor:
    format = format_from_name(name)
    packed = core_quantize(weight, format, SEARCH.ratios(), SEARCH.zero_steps, importance)
    assert packed is not None, "the core has code for this format"
    return packed


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_core_makes_the_weighed_error_as_small_as_the_definition(name: str, dtype: torch.dtype) -> None:
    weight, importance = case(dtype)
    packed = by_core(weight, name, importance)
    format = format_from_name(name)
    expected = pack(weight, format, fit_grid(weight, format, SEARCH, importance))
    found, wanted = (weighed_error(weight, p, importance) for p in (packed, expected))
    assert found == pytest.approx(wanted, rel=1e-2)
    # Sums in another order may take another candidate of the same worth in a group; nearly all codes are the same.
    assert float((unpack(packed) == unpack(expected)).float().mean()) > 0.97


@pytest.mark.parametrize("name", ["int3_asym_g32", "int4", "int4_channel", "nf4"])
def test_importance_moves_the_error_to_inputs_that_matter_less(name: str) -> None:
    weight, importance = case()
    weighed, plain = by_core(weight, name, importance), by_core(weight, name, None)
    assert weighed_error(weight, weighed, importance) < 0.97 * weighed_error(weight, plain, importance)
    assert weighed_error(weight, weighed, torch.ones(203)) > weighed_error(weight, plain, torch.ones(203))


def test_equal_importances_are_no_importance_but_a_scale() -> None:
    weight, _ = case()
    one, many = (by_core(weight, "int4", torch.full((203,), value)) for value in (1.0, 64.0))
    assert torch.equal(one.codes, many.codes) and torch.equal(one.scales, many.scales)


def test_importance_of_any_float_type_and_layout() -> None:
    weight, importance = case()
    expected = by_core(weight, "int4", importance.half().float())
    strided = torch.stack([importance.half(), importance.half()], dim=1)[:, 0]
    assert torch.equal(by_core(weight, "int4", strided).codes, expected.codes)


def test_experts_share_the_importance_of_their_inputs() -> None:
    _, importance = case()
    stack = drawn(3, 5, 203, seed=9)
    packed = by_core(stack, "int4", importance)
    for expert in range(3):
        assert torch.equal(packed.codes[expert], by_core(stack[expert], "int4", importance).codes)


@pytest.mark.parametrize("name", ["int4", "int4_tensor", "int4_dq", "q4_k"])
@pytest.mark.parametrize("shape", [(202,), (204,), (7, 203), (1,)], ids=str)
def test_an_importance_of_another_length_is_refused(name: str, shape: tuple[int, ...]) -> None:
    weight, _ = case()
    with pytest.raises(WeightError, match="one number for each of the 203 inputs"):
        quantize(weight, format_from_name(name), SEARCH, torch.ones(shape))


def test_what_the_core_leaves_to_the_definition() -> None:
    weight, importance = case()
    for name, other in (("int4_tensor", weight), ("int4_dq", weight), ("int4", weight.double())):
        assert core_quantize(other, format_from_name(name), SEARCH.ratios(), 1, importance) is None
        packed = quantize(other, format_from_name(name), SEARCH, importance)
        assert weighed_error(other, packed, importance) < float((other.double().square() * importance).sum()) / 20
