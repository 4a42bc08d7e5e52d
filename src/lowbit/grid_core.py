"""The grid in the compiled core: the same definition as `grid.py`, for weights in CPU memory, many times faster.

    core_quantize   weight -> PackedTensor      one pass over the weight, one slice of each row in cache
    core_unpack     PackedTensor -> weight
    core_distance   weight, PackedTensor -> |w - w^|^2 and |w|^2, without unpacking more than a row

`grid.py` is the definition and serves every other device; the tests hold the two together bit for bit. They give None
for what the core has no code for, and then the definition itself does the work.
"""

from __future__ import annotations

import torch

from lowbit.core import calls
from lowbit.core.library import library_path
from lowbit.core.tensors import DTYPE_NAMES, addresses, as_rows, rows_of
from lowbit.formats import Format
from lowbit.packing import PackedTensor, empty_buffers
from lowbit.search import Search


def core_serves(format: Format, tensor: torch.Tensor) -> bool:
    """Whether the core reads a format on the device of a tensor."""
    return tensor.device.type == "cpu" and library_path() is not None


def core_quantize(
    weight: torch.Tensor, format: Format, search: Search, importance: torch.Tensor | None
) -> PackedTensor | None:
    """Round a weight [.., out, in] onto the grid of `grid.fit_grid`."""
    if not core_serves(format, weight) or weight.dtype not in DTYPE_NAMES or not weight.numel():
        return None
    if not search.refit:
        return None
    # One scale for a whole tensor, and a second level of scales, need two passes over it; k-quants are fitted in kquants.py.
    if format.group_size == 0 or format.scale_block or format.kind == "kquant":
        return None
    rows = as_rows(weight)
    buffers = empty_buffers(format, tuple(weight.shape), torch)
    importance = None if importance is None else importance.float().contiguous()
    calls.quantize(
        format,
        rows_of(rows),
        addresses(buffers),
        search.ratios(),
        search.zero_steps,
        0 if importance is None else importance.data_ptr(),
    )
    return PackedTensor(format, tuple(weight.shape), **buffers)


def core_unpack(packed: PackedTensor, dtype: torch.dtype) -> torch.Tensor | None:
    """The weight that a PackedTensor stands for."""
    format, shape = packed.format, packed.shape
    if not _core_reads(packed) or dtype not in DTYPE_NAMES:
        return None
    weight = torch.empty(shape, dtype=dtype)
    if not weight.numel():
        return weight
    contiguous = {name: tensor.contiguous() for name, tensor in packed.tensors().items()}
    calls.dequantize(format, addresses(contiguous), rows_of(as_rows(weight)))
    return weight


def core_distance(weight: torch.Tensor, packed: PackedTensor) -> tuple[float, float] | None:
    """The sums of (w - w^)^2 and of w^2."""
    if not _core_reads(packed) or weight.dtype not in DTYPE_NAMES or not weight.numel():
        return None
    rows = as_rows(weight)
    contiguous = {name: tensor.contiguous() for name, tensor in packed.tensors().items()}
    return calls.distance(packed.format, addresses(contiguous), rows_of(rows))


def _core_reads(packed: PackedTensor) -> bool:
    """Whether the core can turn a packed weight back into numbers."""
    float_zeros = packed.zeros is not None and packed.zeros.dtype != torch.uint8
    stacked_tensor_scale = len(packed.shape) > 2 and packed.format.group_size == 0
    return (
        core_serves(packed.format, packed.codes)
        and packed.order is None
        and not float_zeros
        and not stacked_tensor_scale
    )
