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
from lowbit.checkpoint.foreign import Tensors, load_foreign
from lowbit.checkpoint.packed_saves import read_packed
from lowbit.checkpoint.ready_made import Packing, read_folder
from lowbit.configs.classes import CONFIGS
from lowbit.contents import CONFIG
from lowbit.errors import CheckpointError

# Fields that no other system writes into a configuration.
_OF_THIS_SYSTEM = {"weight_dtype", "compute_dtype", "scale_dtype"}
_BACKEND = "inc"


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
    return read_packed(folder, model, tensors, packing)


def _group_size(fields: dict[str, Any]) -> int | None:
    size = fields.get("group_size")
    return int(size) if isinstance(size, int) else None
