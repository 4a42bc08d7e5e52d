"""The CPU row of formats that round activations to a fixed range: the core's int8 products, with the layer's own scale.

The core gives each stretch of 128 activations of a row the scale max|x| / 127. It is handed whole numbers, 127 of them at a time
and one more input that is always 127 against weights that are always 0: so that scale is 1, nothing is rounded twice, and the sums
are those of integers. With q the 256 codes of a range (`reference.round_to_range`), s its step and z the code of 0:

    x^ = s (q - z)        q' = q - 128        y = x^ W^T = s (q' W^T + (128 - z) sum_j W_j)

int8 as the core takes it ends at -127, and q' at -128. Rows that hold such a number, which is what lies at the lower end of the
range or below it, get one more product: where q' is -128, -1 is missing.

The sums of a weight's rows are kept beside it, 4 bytes for each output. A weight without a range yet rounds
each row by itself.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from lowbit.bits import pack_codes, unpack_codes
from lowbit.errors import KernelError
from lowbit.formats import Format
from lowbit.kernels import cpu_rows
from lowbit.kernels.cpu_rows import PREPARED
from lowbit.kernels.reference import range_grid
from lowbit.packing import PackedTensor

RANGE = "input_range"
_SUMS = "row_sums"
_MIDDLE = 128
# The largest magnitude of the core's activations, and what the additional input of each stretch always is.
_MOST = 127
# What shares a scale in the core: where a row is a multiple of it, each stretch is as long as that.
_STRETCH = 128
_BITS = 8


def refuses(format: Format, shape: tuple[int, ...], compute: str) -> str | None:
    if not format.fixed_range:
        return f"{format} has no fixed range of activations"
    if len(shape) != 2 or format.bits != _BITS or format.group_size != -1:
        return f"fixed ranges are multiplied as matrices of 8 bits with a scale for each row, not as {format} {list(shape)}"
    return cpu_rows.refuses(format.unfixed, _wide_shape(shape), compute)


def _wide_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """The shape [out, wide] of a weight with the additional inputs."""
    return shape[0], -(-shape[1] // (_STRETCH - 1)) * _STRETCH


def _widen(values: torch.Tensor, zero: float, last: float) -> torch.Tensor:
    """Values [rows, in] as [rows, wide]: `last` behind every 127 of them, and `zero` where a row ends before its stretch."""
    stretches = torch.nn.functional.pad(values, (0, -values.shape[1] % (_STRETCH - 1)), value=zero)
    return torch.nn.functional.pad(stretches.view(len(values), -1, _STRETCH - 1), (0, 1), value=last).flatten(1)


def _narrow(values: torch.Tensor, inputs: int) -> torch.Tensor:
    """The inverse of `_widen`."""
    return values.view(len(values), -1, _STRETCH)[..., :-1].flatten(1)[:, :inputs]


def prepare(packed: PackedTensor) -> dict[str, torch.Tensor]:
    if packed.input_range is None:
        return cpu_rows.prepare(replace(packed, format=packed.format.unfixed))
    codes = unpack_codes(packed.codes, _BITS, packed.shape[1])
    sums = (codes.to(torch.int32) - _MIDDLE).sum(1) * packed.scales.float().view(-1)
    wider = replace(
        packed,
        format=packed.format.unfixed,
        shape=_wide_shape(packed.shape),
        codes=pack_codes(_widen(codes, _MIDDLE, _MIDDLE), _BITS),
        input_range=None,
    )
    return cpu_rows.prepare(wider) | {RANGE: packed.input_range, _SUMS: sums}


def restore(buffers: dict[str, torch.Tensor], format: Format, shape: tuple[int, ...]) -> PackedTensor:
    if RANGE not in buffers:
        return replace(cpu_rows.restore(buffers, format.unfixed, shape), format=format)
    wider = cpu_rows.restore({PREPARED: buffers[PREPARED]}, format.unfixed, _wide_shape(shape))
    codes = pack_codes(_narrow(unpack_codes(wider.codes, _BITS, wider.shape[1]), shape[1]).contiguous(), _BITS)
    return PackedTensor(format, shape, codes, wider.scales, input_range=buffers[RANGE])


def run(
    x: torch.Tensor, buffers: dict[str, torch.Tensor], format: Format, shape: tuple[int, ...], compute: str
) -> torch.Tensor:
    """x [.., in], rounded to the range of the layer, times a prepared weight [out, in]: [.., out] in the type of x."""
    if RANGE not in buffers:
        return cpu_rows.run(x, buffers, format.unfixed, shape, compute)
    cpu_rows.check_input(x, shape)
    step, zero = range_grid(buffers[RANGE])
    codes = x.detach().reshape(-1, shape[1]).float().div(step).round_().add_(zero - _MIDDLE).clamp_(-_MIDDLE, _MOST)
    least = (codes.amin(1) == -_MIDDLE).nonzero().view(-1)
    missing = (codes[least] == -_MIDDLE).float()
    sums = _product(codes.clamp_(min=-_MOST), buffers, shape)
    if len(least):
        sums[least] -= _product(missing, buffers, shape)
    y = sums.addcmul_(buffers[_SUMS], _MIDDLE - zero).mul_(step)
    return y.view(*x.shape[:-1], shape[0]).to(x.dtype)


def _product(codes: torch.Tensor, buffers: dict[str, torch.Tensor], shape: tuple[int, ...]) -> torch.Tensor:
    """Whole numbers [rows, in] times a weight: fp32 [rows, out]."""
    y = torch.empty(len(codes), shape[0])
    # "int8" and not "auto": the numbers of a row keep one scale.
    cpu_rows.multiply(buffers[PREPARED], _widen(codes, 0, _MOST), y, "int8")
    return y


def rows(buffers: dict[str, torch.Tensor], format: Format, shape: tuple[int, ...], ids: torch.Tensor) -> torch.Tensor:
    """Rows of a weight [out, in] in fp32."""
    if RANGE not in buffers:
        return cpu_rows.rows(buffers, format.unfixed, shape, ids)
    wider = cpu_rows.rows({PREPARED: buffers[PREPARED]}, format.unfixed, _wide_shape(shape), ids)
    return _narrow(wider, shape[1])


def expert(
    buffers: dict[str, torch.Tensor], format: Format, shape: tuple[int, ...], index: int
) -> dict[str, torch.Tensor]:
    raise KernelError("the weights of experts have no fixed range of their own")


def run_experts(
    x: torch.Tensor,
    buffers: dict[str, torch.Tensor],
    format: Format,
    shape: tuple[int, ...],
    begins: torch.Tensor,
    compute: str,
) -> torch.Tensor:
    raise KernelError("the weights of experts have no fixed range of their own")
