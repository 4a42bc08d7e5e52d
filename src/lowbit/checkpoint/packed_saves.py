"""Folders that GPTQ, AWQ or AutoRound packed, whichever program wrote them: read as they lie, with none of these programs.

    AutoModelForCausalLM.from_pretrained("model-GPTQ")
    AutoModelForCausalLM.from_pretrained("model-AWQ", load_in_4bit=True)         as scripts of BigDL-LLM say it

Codes, scales, zero points and the order of inputs stay as they are; nothing is rounded again. Where the model has no bias, a bias
of zeros, which some of these programs write, is left out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from lowbit.checkpoint.folder import check_folder, quantization_fields, refuse_pickles
from lowbit.checkpoint.foreign import Tensors, as_own, load_foreign
from lowbit.checkpoint.ready_made import METHODS, Packing, packing_fields, read_folder, read_linear
from lowbit.contents import CONFIG, file_names, pickles_alone, read_tensors
from lowbit.errors import CheckpointError
from lowbit.interop import gptq
from lowbit.models.walk import find_targets
from lowbit.packing import PackedTensor

_PARTS = (*gptq.NAMES, "bias")
_CODES = f".{gptq.WEIGHT}"


def packed_fields(folder: Path) -> dict[str, Any] | None:
    """What a folder of these programs says about itself; None for every other folder."""
    if not (folder / CONFIG).is_file():
        return None
    fields = quantization_fields(folder)
    if fields is not None:
        return fields if fields.get("quant_method") in METHODS else None
    fields = packing_fields(folder)
    return fields if fields is not None and _holds_codes(folder) else None


def _holds_codes(folder: Path) -> bool:
    """Whether the weights are codes, where no more than a file beside config.json says so."""
    return not pickles_alone(file_names(folder)) and any(one.name.endswith(_CODES) for one in read_tensors(folder))


def load_packed_save(auto_class: Any, folder: Path, allow_pickle: bool, dtype: Any = None, **keywords: Any) -> Any:
    """A transformers model from such a folder; pickles of it are read where the caller trusts them, as tensors alone."""
    if not allow_pickle:
        refuse_pickles(folder, file_names(folder))
    check_folder(folder)
    return load_foreign(auto_class, folder, read_packed_save, dtype, **keywords)


def read_packed_save(folder: Path, model: nn.Module) -> tuple[Tensors, dict[str, Any]]:
    """Such a folder as one of ours would be. `model` gives the shapes."""
    tensors, fields = read_folder(folder)
    return read_packed(folder, model, tensors, Packing.of(fields))


def read_packed(folder: Path, model: nn.Module, tensors: Tensors, packing: Packing) -> tuple[Tensors, dict[str, Any]]:
    """The tensors of a folder in our form, and what the configuration of such a folder would say."""
    packed: dict[str, PackedTensor] = {}
    for target in find_targets(model):
        if f"{target.path}{_CODES}" not in tensors:
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
    lost = next((name for name in tensors if name.endswith(_CODES)), None)
    if lost is not None or not packed:
        what = f"packs {lost}" if lost else "packs nothing"
        raise CheckpointError(
            f"{folder} {what}, which does not fit a {type(model).__name__}: it is of another model, or of one whose experts "
            "transformers keeps in one weight today"
        )
    own, fields = as_own(packed)
    return tensors | own, fields
