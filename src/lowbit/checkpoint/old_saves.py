"""Folders that `save_low_bit` of BigDL-LLM and ipex-llm wrote: pickles of packed bytes, read as tensors and nothing else.

    AutoModelForCausalLM.load_low_bit("old-folder", allow_pickle=True)         then save_low_bit writes it anew, without pickles
    lowbit.load_low_bit(model, "old-folder", allow_pickle=True)                a torch module of any kind

`pytorch_model*.bin` is read with torch's `weights_only`: a file that holds anything but tensors is refused before anything of it
runs. config.json (or bigdl_config.json beside a plain torch module) names one type for the whole folder; which weights have another
one, because their rows did not divide or because the name was a mixture, is seen by their size. The projections of queries, keys
and values, which that system had merged, are cut apart again; rows are whole blocks, so this moves bytes only.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from lowbit.checkpoint.foreign import Tensors, as_own, load_foreign
from lowbit.contents import CONFIG, pickles_alone, read_json
from lowbit.errors import CheckpointError, nearest
from lowbit.interop.ipex_blocks import FORMS, OLD_TYPES, UNREADABLE, read_blocks
from lowbit.models.walk import Target, find_targets, stored_order
from lowbit.packing import PackedTensor

PLAIN_CONFIG = "bigdl_config.json"
_KEY = "bigdl_transformers_low_bit"
_INDEX = "pytorch_model.bin.index.json"
# What took the place of a type in rows that its blocks do not divide.
_FALLBACKS = {"q4_k": "asym_int4", "q5_k": "asym_int5", "q6_k": "sym_int8"}
# Another form that blocks of a type may have.
_ALSO = {"q4_k": "q4_k_gguf"}
# The types that a mixture may have chosen for a weight, the commonest first.
_MIXTURES = {"gguf_q4k_m": ("q4_k", "q6_k"), "gguf_q4k_s": ("q4_k", "q6_k", "q5_k")}
_HEAD_TYPES = ("q6_k", "sym_int8")
_EMBEDDING_TYPES = ("q4_k", "q2_k")
# A projection that the old system had put together, and the linears of the model that it consists of.
_MERGED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def old_low_bit(folder: Path) -> str | None:
    """The old system's name of the type of a folder that it saved; None for every other folder."""
    if not folder.is_dir() or not pickles_alone(path.name for path in folder.iterdir()):
        return None
    for name in (PLAIN_CONFIG, CONFIG):
        if (folder / name).is_file():
            found = read_json(folder / name).get(_KEY)
            if found:
                return str(found)
    return None


def load_old_save(auto_class: Any, folder: Path, allow_pickle: bool, dtype: Any = None, **keywords: Any) -> Any:
    """A transformers model from an old folder; `auto_class` is a class of transformers with `from_config`, or the model's own."""
    refuse_untrusted(folder, allow_pickle)
    return load_foreign(auto_class, folder, read_old_save, dtype, **keywords)


def refuse_untrusted(folder: Path, allow_pickle: bool) -> None:
    """Refuse an old folder whose source nobody vouches for, or whose type cannot be read."""
    if not allow_pickle:
        raise CheckpointError(
            f"{folder} was saved by BigDL-LLM or ipex-llm, as pickles, which can run code when they are loaded: "
            "pass allow_pickle=True if you trust their source (nothing but tensors is read), and save_low_bit it anew"
        )
    name = old_low_bit(folder) or ""
    if name in UNREADABLE:
        raise CheckpointError(
            f"{folder} holds {name} weights, which cannot be read: {UNREADABLE[name]}; "
            "start from the model in full precision"
        )
    if name not in OLD_TYPES and name not in _MIXTURES:
        raise CheckpointError(f"{folder} says it holds {name!r} weights: {nearest(name, [*OLD_TYPES, *_MIXTURES])}")


def read_old_save(folder: Path, model: nn.Module) -> tuple[Tensors, dict[str, Any]]:
    """An old folder as one of ours would be: tensors by name, and what its configuration would say. `model` gives the shapes."""
    old = old_low_bit(folder) or ""
    tensors = dict(_read_pickles(folder))
    found: dict[str, PackedTensor] = {}
    for target in find_targets(model):
        if target.role in ("experts", "conv"):
            continue
        _take_apart_(tensors, target, model)
        data = tensors.get(f"{target.path}.weight")
        dense = cast(torch.Tensor, target.module.weight)
        shape = tuple(stored_order(target, dense).shape)
        if data is None or (data.shape == dense.shape and data.is_floating_point()):
            continue
        kind = _type_of(target, data, old, shape)
        found[target.path] = read_blocks(target.path, tensors.pop(f"{target.path}.weight"), kind, shape)
    _check_rest(folder, tensors)
    if not found:
        raise CheckpointError(f"{folder} holds no weight that this model could have packed; it is of another model")
    own, fields = as_own(found)
    return tensors | own, fields


def _read_pickles(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of all files of a folder."""
    if (folder / _INDEX).is_file():
        weight_map = read_json(folder / _INDEX).get("weight_map")
        names = sorted(set(weight_map.values())) if isinstance(weight_map, dict) else []
    else:
        names = sorted(path.name for path in folder.glob("pytorch_model*.bin"))
    if not names:
        raise CheckpointError(f"{folder} holds no pytorch_model.bin: get it again")
    for file in (folder / name for name in names):
        if file.parent != folder or not file.is_file():
            raise CheckpointError(f"{folder} lacks {file.name}, which its index names: get it again")
        yield from _read_pickle(file).items()


def _read_pickle(file: Path) -> Tensors:
    try:
        held = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{file} holds something other than tensors, or is damaged; it is refused, and nothing of it was run "
            f"({str(error).partition('. ')[0]})"
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{file} cannot be read: it is damaged; get it again") from error
    if not isinstance(held, dict) or not all(isinstance(k, str) and type(t) is torch.Tensor for k, t in held.items()):
        raise CheckpointError(f"{file} holds something other than tensors by name; it is refused")
    return held


def _take_apart_(tensors: Tensors, target: Target, model: nn.Module) -> None:
    """Where the folder has several linears of a model in one, or one in several, give the target its own."""
    parent, _, last = target.path.rpartition(".")
    for whole, names in _MERGED.items():
        for suffix in ("weight", "bias"):
            keys = [f"{parent}.{name}.{suffix}" for name in names]
            merged = f"{parent}.{whole}.{suffix}"
            if last in names and merged in tensors:
                counts = [model.get_submodule(f"{parent}.{name}").out_features for name in names]
                for key, part in zip(keys, _rows(tensors.pop(merged), counts), strict=True):
                    tensors[key] = part
            elif last == whole and merged not in tensors and all(key in tensors for key in keys):
                tensors[merged] = torch.cat([tensors.pop(key) for key in keys])


def _rows(tensor: torch.Tensor, counts: list[Any]) -> list[torch.Tensor]:
    """A tensor cut by rows of the weight; the rows of a packed one are equally long runs of its bytes."""
    rows = sum(counts)
    if len(tensor) == rows:
        return list(torch.split(tensor, counts))
    if tensor.numel() % rows:
        raise CheckpointError(
            f"a merged weight of {rows} rows has {tensor.numel()} values, which is no number for each row"
        )
    return list(torch.split(tensor.reshape(-1), [count * (tensor.numel() // rows) for count in counts]))


def _type_of(target: Target, data: torch.Tensor, old: str, shape: tuple[int, ...]) -> str:
    """The old type of a weight: the first that may stand at its place and takes as many bytes."""
    types = list(_MIXTURES.get(old, (old,)))
    types += [_FALLBACKS[kind] for kind in types if kind in _FALLBACKS]
    if target.role == "head":
        types += _HEAD_TYPES
    if target.role == "embedding":
        types = [*_EMBEDDING_TYPES, *types]
    types += [_ALSO[kind] for kind in types if kind in _ALSO]
    fitting = [kind for kind in types if FORMS[kind].nbytes(shape) == data.nbytes]
    if not fitting:
        sizes = ", ".join(f"{FORMS[kind].nbytes(shape)} as {kind}" for kind in types if FORMS[kind].nbytes(shape))
        raise CheckpointError(
            f"{target.path} has {data.nbytes} bytes in the folder, and a weight {list(shape)} takes {sizes or 'others'}: "
            "the folder is damaged, of another model, or of a version of ipex-llm with other blocks"
        )
    return fitting[0]


def _check_rest(folder: Path, tensors: Tensors) -> None:
    """Refuse packed weights that no linear of the model claimed."""
    packed = [name for name, tensor in tensors.items() if tensor.dtype == torch.uint8]
    if packed:
        raise CheckpointError(
            f"{folder} holds {len(packed)} packed weights that the model has no place for ({packed[0]}): it is of another "
            "model, or of one whose experts transformers keeps in one weight today"
        )
