"""Rung 3: every kernel row equals the reference, for every format it takes, at every row count where its code changes."""

from __future__ import annotations

import pytest
import torch

from lowbit.errors import KernelError
from lowbit.formats import FORMATS, as_format
from lowbit.grid import quantize, unpack
from lowbit.kernels.table import CORE, KERNELS, choose, refusals
from lowbit.layers import LowBitLinear, PackedWeight

ROWS = (1, 2, 8, 16, 17, 31, 33, 256)
FORMAT_NAMES = [
    *FORMATS,
    "int4_g32",
    "int4_asym",
    "int2_asym_g16",
    "int4_fine_g32",
    "int8_channel",
    "int4_g128_bf16",
    "int5_fp32",
    "nf4_g32",
]
# Relative to the norm of the product. fp32: order of sums. int8: activations rounded to 1/127 of the largest of their
# group.
TOLERANCE = {("fp32", torch.float32): 1e-6, ("fp32", torch.bfloat16): 4e-3, ("fp32", torch.float16): 5e-4}
TOLERANCE_INT8 = 0.016


def product(format: str, out_features: int, in_features: int, rows: int, dtype: torch.dtype, compute: str) -> float:
    """The core's distance from the reference, relative."""
    torch.manual_seed(rows)
    packed = quantize(torch.randn(out_features, in_features), as_format(format))
    x = torch.randn(rows, in_features).to(dtype)
    exact = x.float() @ unpack(packed).T
    y = CORE.run(x, CORE.prepare(packed), packed.format, packed.shape, compute)
    assert y.dtype == dtype and y.shape == exact.shape
    return float((y.float() - exact).norm() / exact.norm())


@pytest.mark.parametrize("format", FORMAT_NAMES)
@pytest.mark.parametrize("rows", ROWS)
def test_core_equals_the_reference(format: str, rows: int) -> None:
    reason = CORE.refuses(as_format(format), (40, 200), "auto")
    if reason:
        assert format in reason
        return
    assert product(format, 40, 200, rows, torch.float32, "auto") < TOLERANCE_INT8
    if as_format(format).act_bits == 16:
        assert product(format, 40, 200, rows, torch.float32, "fp32") < TOLERANCE["fp32", torch.float32]


@pytest.mark.parametrize("shape", [(1, 1), (3, 65), (17, 64), (64, 31), (130, 257), (16, 1024)])
@pytest.mark.parametrize("format", ["int4", "int3_asym_g32", "int3_fine_g32", "nf4", "int8_channel"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_awkward_shapes_and_types(format: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    for rows in (1, 5, 40):
        assert product(format, *shape, rows, dtype, "fp32") < TOLERANCE["fp32", dtype]


@pytest.mark.parametrize("format", FORMAT_NAMES)
def test_prepare_and_restore_are_inverse(format: str) -> None:
    packed = quantize(torch.randn(37, 331), as_format(format))
    for row in KERNELS["cpu"]:
        if row.refuses(packed.format, packed.shape, "auto") is None:
            restored = row.restore(row.prepare(packed), packed.format, packed.shape)
            for name, tensor in packed.tensors().items():
                assert torch.equal(restored.tensors()[name].view(torch.uint8), tensor.view(torch.uint8)), name


def test_unusual_inputs() -> None:
    packed = quantize(torch.randn(24, 96), as_format("int4_g32"))
    buffers = CORE.prepare(packed)
    weight = unpack(packed)
    strided = torch.randn(96, 7).T
    transposed = CORE.run(strided, buffers, packed.format, packed.shape, "fp32")
    assert torch.allclose(transposed, strided @ weight.T, atol=1e-4)
    assert CORE.run(torch.empty(0, 96), buffers, packed.format, packed.shape, "auto").shape == (0, 24)
    # Rows that share memory: repeated, overlapping, and a column of a wider matrix.
    for shared in (
        torch.randn(1, 96).expand(5, 96),
        torch.randn(2, 1, 96).expand(2, 4, 96),
        torch.randn(200).unfold(0, 96, 32),
        torch.randn(5, 128)[:, :96],
    ):
        assert torch.equal(
            CORE.run(shared, buffers, packed.format, packed.shape, "fp32"),
            CORE.run(shared.contiguous(), buffers, packed.format, packed.shape, "fp32"),
        )
    batch = torch.randn(2, 3, 96, dtype=torch.float64)
    assert torch.allclose(
        CORE.run(batch, buffers, packed.format, packed.shape, "fp32"), batch @ weight.T.double(), atol=1e-4
    )


def test_inputs_that_do_not_fit_are_refused() -> None:
    packed = quantize(torch.randn(24, 96), as_format("int4_g32"))
    for x in (torch.randn(3, 128), torch.randn(4, 48), torch.randn(96, 1)):
        with pytest.raises(KernelError, match="does not fit a weight"):
            CORE.run(x, CORE.prepare(packed), packed.format, packed.shape, "auto")
    with pytest.raises(KernelError, match="x is on meta and the weight is on the CPU"):
        CORE.run(torch.empty(2, 96, device="meta"), CORE.prepare(packed), packed.format, packed.shape, "auto")


def test_zeros_stay_zero_and_large_values_stay_finite() -> None:
    packed = quantize(torch.randn(24, 96), as_format("int4_g32"))
    buffers = CORE.prepare(packed)
    assert not CORE.run(torch.zeros(3, 96), buffers, packed.format, packed.shape, "auto").any()
    assert torch.isfinite(CORE.run(torch.full((3, 96), 1e6), buffers, packed.format, packed.shape, "auto")).all()


def test_a_kernel_asked_for_by_name_refuses_aloud() -> None:
    format = as_format("int4")
    assert choose(format, (8, 64), "cpu").name == "core"
    assert choose(format, (8, 64), "cpu", name="reference").name == "reference"
    assert choose(format, (8, 64), "cuda").name == "reference"
    with pytest.raises(KernelError, match="did you mean core"):
        choose(format, (8, 64), "cpu", name="cores")
    with pytest.raises(KernelError, match="cannot run a w8a8 weight"):
        choose(as_format("w8a8"), (8, 256), "cpu", compute="fp32", name="core")
    with pytest.raises(KernelError, match="no row for the device 'cuda'"):
        choose(format, (8, 64), "cuda", name="core")
    with pytest.raises(KernelError, match="compute='fp64' is not known"):
        choose(format, (8, 64), "cpu", compute="fp64")


def test_every_device_ends_with_the_reference_which_refuses_nothing() -> None:
    for device, rows in KERNELS.items():
        assert rows[-1].name == "reference"
        for name in FORMAT_NAMES:
            reasons = dict(refusals(as_format(name), (8, 256), device))
            assert reasons["reference"] is None
            assert all(reason is None or len(reason) > 20 for reason in reasons.values())


def test_compute_is_honoured() -> None:
    layer = LowBitLinear(PackedWeight(quantize(torch.randn(64, 512), as_format("int4"))))
    x = torch.randn(4, 512)
    exact = x @ layer.weight.T
    errors = {}
    for compute in ("int8", "fp32"):
        layer.packed_weight.compute = compute
        layer.packed_weight.prepare_()
        errors[compute] = float((layer(x) - exact).norm() / exact.norm())
    assert errors["fp32"] < 1e-6 < 1e-3 < errors["int8"] < TOLERANCE_INT8


@pytest.mark.parametrize("compute", ["bf16", "fp16"])
@pytest.mark.parametrize("format", ["int4", "nf4_dq", "q4_k", "q4_1"])
def test_narrow_floats_round_both_sides_and_sum_in_fp32(format: str, compute: str) -> None:
    packed = quantize(torch.randn(40, 512), as_format(format))
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[compute]
    weight = unpack(packed).to(dtype).float()
    buffers = CORE.prepare(packed)
    for rows in (1, 3, 19):
        x = torch.randn(rows, 512)
        y = CORE.run(x, buffers, packed.format, packed.shape, compute)
        assert torch.allclose(y, x.to(dtype).float() @ weight.T, atol=1e-4)
        assert not torch.allclose(y, x @ unpack(packed).T, atol=1e-5)


@pytest.mark.parametrize("format", ["nf4_dq", "int4_asym_dq", "int4_fine_dq"])
def test_rows_are_looked_up_where_scales_are_quantised_again(format: str) -> None:
    """Zero points included, which a row of a block of scales takes along."""
    table = quantize(torch.randn(50, 331), as_format(format))
    ids = torch.tensor([0, 49, 7, 7])
    for row in KERNELS["cpu"]:
        if row.refuses(table.format, table.shape, "auto") is None:
            assert torch.equal(row.rows(row.prepare(table), table.format, table.shape, ids), unpack(table)[ids])


@pytest.mark.parametrize("format", FORMAT_NAMES)
def test_rows_and_experts_of_every_row_of_the_table(format: str) -> None:
    """Looking rows up and taking one expert out give what unpacking the whole weight gives."""
    table = quantize(torch.randn(50, 331), as_format(format))
    stack = quantize(torch.randn(3, 20, 331), as_format(format))
    ids = torch.tensor([0, 49, 7, 7])
    for row in KERNELS["cpu"]:
        if row.refuses(table.format, table.shape, "auto"):
            continue
        found = row.rows(row.prepare(table), table.format, table.shape, ids)
        assert torch.equal(found, unpack(table)[ids])
        if row.refuses(stack.format, stack.shape, "auto"):
            continue
        buffers = row.prepare(stack)
        one = row.restore(row.expert(buffers, stack.format, stack.shape, 2), stack.format, stack.shape[1:])
        assert torch.equal(unpack(one), unpack(stack)[2])
        for name, tensor in row.restore(buffers, stack.format, stack.shape).tensors().items():
            assert torch.equal(tensor.view(torch.uint8), stack.tensors()[name].view(torch.uint8)), name


def test_rows_outside_the_table_are_refused() -> None:
    table = quantize(torch.randn(50, 64), as_format("int4"))
    with pytest.raises(KernelError, match="row 50 of a weight with 50 rows"):
        CORE.rows(CORE.prepare(table), table.format, table.shape, torch.tensor([50]))
