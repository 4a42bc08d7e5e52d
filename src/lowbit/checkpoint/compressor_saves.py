"""Folders that Neural Compressor's transformers-like API saved.

    AutoModelForCausalLM.from_pretrained("saved_by_neural_compressor")

Its five algorithms all write GPTQ's tensors, whatever config.json calls the method: qweight, qzeros (less one), scales, a g_idx
where inputs are sorted, and a bias of zeros where the linear has none. AWQ's own layout is in a folder whose configuration names
another `backend` than "inc": that library read those, and did not write them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from lowbit.checkpoint.folder import quantization_fields
from lowbit.checkpoint.foreign import Tensors, as_own, load_foreign
from lowbit.checkpoint.ready_made import Packing, read_folder, read_linear
from lowbit.configs.classes import CONFIGS
from lowbit.contents import CONFIG
from lowbit.errors import CheckpointError
from lowbit.interop import gptq
from lowbit.models.walk import find_targets
from lowbit.packing import PackedTensor

# Fields that no other system writes into a configuration.
_OF_THIS_SYSTEM = {"weight_dtype", "compute_dtype", "scale_dtype"}
_BACKEND = "inc"
_PARTS = (*gptq.NAMES, "bias")


def compressor_fields(folder: Path) -> dict[str, Any] | None:
    """What a folder's configuration says that this system saved; None for every other folder."""
    fields = quantization_fields(folder) if (folder / CONFIG).is_file() else None
    if fields is None or str(fields.get("quant_method")) not in CONFIGS or not fields.keys() >= _OF_THIS_SYSTEM:
        return None
    return fields


def load_compressor_save(auto_class: Any, folder: Path, dtype: Any = None, **keywords: Any) -> Any:
    """A transformers model from such a folder, packed as it lies there."""
    if not any(folder.glob("*.safetensors")):
        raise CheckpointError(f"{folder} was saved by Neural Compressor, and holds no safetensors: save it anew there")
    return load_foreign(auto_class, folder, read_compressor_save, dtype, **keywords)


def read_compressor_save(folder: Path, model: nn.Module) -> tuple[Tensors, dict[str, Any]]:
    """A folder of that system as one of ours would be. `model` gives the shapes."""
    tensors, fields = read_folder(folder)
    is_awq = fields.get("quant_method") == "awq" and fields.get("backend") not in (None, _BACKEND)
    packing = Packing("awq" if is_awq else "gptq", _group_size(fields))
    packed: dict[str, PackedTensor] = {}
    for target in find_targets(model):
        if f"{target.path}.{gptq.WEIGHT}" not in tensors:
            continue
        parts = {part: tensors.pop(f"{target.path}.{part}") for part in _PARTS if f"{target.path}.{part}" in tensors}
        bias = parts.pop("bias", None)
        packed[target.path] = read_linear(target.path, parts, target, packing)
        if getattr(target.module, "bias", None) is not None and bias is not None:
            tensors[f"{target.path}.bias"] = bias
        elif bias is not None and bool(bias.any()):
            raise CheckpointError(
                f"{target.path} has a bias in {folder}, and none in the model: it is of another model"
            )
    lost = next((name for name in tensors if name.endswith(f".{gptq.WEIGHT}")), None)
    if lost is not None or not packed:
        what = f"packs {lost}" if lost else "packs nothing"
        raise CheckpointError(f"{folder} {what}, which does not fit a {type(model).__name__}: it is of another model")
    own, fields = as_own(packed)
    return tensors | own, fields


def _group_size(fields: dict[str, Any]) -> int | None:
    size = fields.get("group_size")
    return int(size) if isinstance(size, int) else None
