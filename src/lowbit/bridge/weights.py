"""Where the weights of a transformers model lie, as the engine takes them: addresses, and nothing copied.

The layers of a low-bit model hold what the core prepares, and dense weights are read where torch keeps them, turned once where it
keeps them transposed. What the engine
cannot read is refused with the reason, which `lowbit.explain` shows.
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch
from torch import nn

from lowbit.core.tensors import DTYPE_NAMES
from lowbit.errors import LowbitError
from lowbit.kernels.cpu_rows import ORDER, PREPARED
from lowbit.layers import LowBitEmbedding, LowBitExperts, LowBitLinear, PackedWeight
from lowbit.models.families import spec_from_config
from lowbit.models.spec import DecoderSpec, Located
from lowbit.runtime.abi import PREPARED as PREPARED_KIND
from lowbit.runtime.weights import MATRIX_ROLES, EngineWeights, Floats, Matrix, plain


def model_weights(model: nn.Module) -> tuple[DecoderSpec, EngineWeights]:
    """What a transformers model is and where its weights lie. Raises a LowbitError that says why the engine cannot have it."""
    spec = spec_from_config(cast(Any, model).config.to_dict())
    held = held_weights(model)
    dense = dict(model.named_parameters(remove_duplicate=False))
    if any(p.device.type != "cpu" for p in dense.values()):
        raise LowbitError("the model is not on the CPU")
    weights = EngineWeights()
    for (role, layer), located in spec.locate({*held, *dense}).items():
        bias = None if located.bias is None else _vector(dense[located.bias])
        if role in MATRIX_ROLES:
            weights.matrices[role, layer] = _matrix(located, held, dense).with_bias(bias)
        else:
            weights.vectors[role, layer] = (_vector(dense[located.names[0][0]]), bias)
    return spec, weights


def held_weights(model: nn.Module) -> dict[str, PackedWeight]:
    """The packed weights under the names that dense ones would have."""
    held: dict[str, PackedWeight] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, LowBitLinear | LowBitEmbedding):
            held[f"{path}.weight"] = module.packed_weight
        elif isinstance(module, LowBitExperts):
            held |= {
                f"{path}.{name}": cast(PackedWeight, getattr(module, name)) for name in (module.up_name, "down_proj")
            }
    return held


def _matrix(located: Located, held: dict[str, PackedWeight], dense: dict[str, nn.Parameter]) -> Matrix:
    name = located.names[0][0]
    if name in held:
        return _packed_matrix(name, held[name])
    weight = _stored_as_read(dense[name], located.weight.transposed)
    if weight.dtype not in DTYPE_NAMES:
        raise LowbitError(f"{name} is {weight.dtype}, which the engine does not read")
    if weight.dtype == torch.bfloat16:
        return plain(weight.view(torch.uint16).numpy(), "bfloat16")
    return plain(weight.numpy())


def _stored_as_read(parameter: nn.Parameter, transposed: bool) -> torch.Tensor:
    """The rows [.., out, in] of a dense weight, where the parameter keeps them.

    GPT-2's Conv1D and some experts keep [.., in, out]. Their numbers are laid out anew, and the parameter becomes the transposed
    view of that: the same shape and the same numbers, in memory once.
    """
    held = parameter.detach()
    rows = held.transpose(-1, -2) if transposed else held
    if not rows.is_contiguous():
        rows = rows.contiguous()
        parameter.data = rows.transpose(-1, -2) if transposed else rows
    return rows


def _packed_matrix(name: str, weight: PackedWeight) -> Matrix:
    if weight.format.fixed_range:
        raise LowbitError(f"{name} ({weight.format}) rounds its input to a fixed range, which the engine does not do")
    if ORDER in weight.tensors:
        raise LowbitError(f"{name} ({weight.format}) keeps its inputs in another order, which the engine does not read")
    buffer = weight.tensors.get(PREPARED)
    if buffer is None:
        kernel = weight.kernel.name if weight.kernel else "none yet"
        raise LowbitError(
            f"{name} ({weight.format}) is run by the kernel {kernel}, and the engine reads what the core prepares"
        )
    count = weight.shape[0] if len(weight.shape) == 3 else 1
    rows, cols = weight.shape[-2:]
    return Matrix(buffer.data_ptr(), rows, cols, PREPARED_KIND, "float32", count, buffer.numel() // count, None, buffer)


def _vector(parameter: torch.Tensor) -> Floats:
    return np.ascontiguousarray(parameter.detach().float().numpy().ravel())
