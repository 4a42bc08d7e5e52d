"""Save: a low-bit model as a Hugging Face folder that other tools read too.

    config.json               with quantization_config: compressed-tensors where it can say everything, else our own method
    model*.safetensors        shards, and an index where there are several
    lowbit/embedding.safetensors   an embedding that is dense in the shards because other readers want it so, packed
    lowbit_report.json        what happened to every weight
    lowbit_activations.json   the ranges of activations, where layers have fixed ones: text that may be edited
    lowbit_engine.json        what the C++ face of the core needs to know, where the engine runs such a model
    generation_config.json, tokenizer, processor, chat template, remote code, licence: as they came with the model

Shards are made and written one at a time, so saving needs room for one of them. A model that is not transformers' own
has a `lowbit.json` in the place of config.json. `model.save_pretrained` of transformers writes the same config and
tensors (see `plain_save.py`).
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from lowbit.checkpoint.companions import copy_companions, travels
from lowbit.checkpoint.folder import replace_folder, unwritten
from lowbit.checkpoint.form import ASIDE, Part, SavedForm, packed_aside, parts, saved_form
from lowbit.checkpoint.hf_names import checkpoint_names, is_transformers_model
from lowbit.checkpoint.hub import fetch_companions, home_of
from lowbit.checkpoint.ranges import write_ranges
from lowbit.configs.base import WeightOnlyConfig
from lowbit.contents import CONFIG, INDEX, OWN_CONFIG, REPORT, WEIGHTS
from lowbit.errors import CheckpointError, LowbitError
from lowbit.progress import Advance, progress
from lowbit.runtime.engine_file import write_engine_file

DEFAULT_SHARD = "5GB"
_UNITS = {
    "": 1,
    "K": 10**3,
    "M": 10**6,
    "G": 10**9,
    "T": 10**12,
    "KI": 1 << 10,
    "MI": 1 << 20,
    "GI": 1 << 30,
    "TI": 1 << 40,
}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?")


def save_low_bit(
    model: nn.Module,
    folder: str | Path,
    tokenizer: Any = None,
    max_shard_size: int | str = DEFAULT_SHARD,
    compact: bool = False,
) -> Path:
    """Save a low-bit model; returns the folder. An interrupted save leaves what was there before.

    `compact` stores every weight once, which only lowbit reads; else other readers' needs come first where they can be met.
    """
    if not isinstance(folder, str | os.PathLike) or not os.fspath(folder):
        raise CheckpointError(f"save_low_bit({folder!r}): name the folder to save the model in")
    target = Path(folder).expanduser()
    if tokenizer is not None and not hasattr(tokenizer, "save_pretrained"):
        raise CheckpointError(f"tokenizer={tokenizer!r} cannot be saved: give the tokenizer or processor itself")
    source = source_folder(model)
    refuse_to_replace_source(target, source)
    if not getattr(model, "lowbit_report", None):
        raise CheckpointError(
            "the model is not low-bit: pass it through optimize_model first, or save it with save_pretrained"
        )
    form = saved_form(model, recipe_fields(model), compact)
    with replace_folder(target) as temporary:
        try:
            _write_weights(model, form, temporary, parse_size(max_shard_size))
            write_aside(model, form, temporary)
        except SafetensorError as error:
            raise CheckpointError(unwritten(target, error)) from error
        home = source or _home_on_hub(model)
        if home is not None:
            copy_companions(home, temporary)
        if is_transformers_model(model):
            _write_config(model, form, temporary)
        else:
            _write_json(temporary / OWN_CONFIG, form.fields)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        write_report(model, temporary)
        describe_to_engine(temporary)
    return target


def describe_to_engine(folder: Path) -> None:
    """Write lowbit_engine.json if the engine runs the model; asked for by hand, the same function says why it does not."""
    with contextlib.suppress(LowbitError):
        write_engine_file(folder)


def parse_size(size: int | str) -> int:
    """Bytes from a number or from a text such as "5GB" or "500MiB"."""
    match = _SIZE.fullmatch(str(size).strip().upper())
    if match is None or match[2] not in _UNITS or float(match[1]) <= 0:
        raise CheckpointError(f"max_shard_size={size!r} is no size; write a number of bytes, or a text like '5GB'")
    return int(float(match[1]) * _UNITS[match[2]])


def recipe_fields(model: nn.Module) -> dict[str, Any]:
    """The recipe that a model was made with, as plain values."""
    recipe = getattr(model, "lowbit_recipe", None)
    return recipe.to_dict() if recipe is not None else {}


def source_folder(model: nn.Module) -> Path | None:
    """The local folder, or GGUF file, that a model was read from."""
    name = getattr(getattr(model, "config", None), "_name_or_path", "")
    return Path(name) if name and Path(name).exists() else None


def _home_on_hub(model: nn.Module) -> Path | None:
    """The folder in the hub's cache of a model that came from there, with what travels along."""
    name = str(getattr(getattr(model, "config", None), "_name_or_path", ""))
    home: Path | None = getattr(model, "lowbit_home", None) or home_of(name)
    if home is not None:
        fetch_companions(name, home, travels)
    return home


def refuse_to_replace_source(target: Path, source: Path | None) -> None:
    """Refuse to write a low-bit model over the model in full precision that it was made from."""
    if source is None or not target.exists() or not target.samefile(source):
        return
    if source.is_dir() and not (source / REPORT).exists():
        raise CheckpointError(
            f"cannot save to {target}: it holds the full-precision model, which would be lost; choose another"
        )


def _write_weights(model: nn.Module, form: SavedForm, folder: Path, limit: int) -> None:
    shards = list(_shards(parts(model, form), limit))
    weight_map: dict[str, str] = {}
    total = 0
    with progress("saving", sum(map(len, shards))) as advance:
        for number, shard in enumerate(shards, 1):
            name = WEIGHTS if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            tensors = _tensors_of(model, shard, advance)
            save_file(tensors, folder / name, metadata={"format": "pt"})
            total += sum(tensor.nbytes for tensor in tensors.values())
            weight_map |= dict.fromkeys(tensors, name)
    if len(shards) > 1:
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})


def _tensors_of(model: nn.Module, shard: list[Part], advance: Advance) -> dict[str, torch.Tensor]:
    """What one file holds, under the names of the checkpoint."""
    tensors: dict[str, torch.Tensor] = {}
    for part in shard:
        made = part.make()
        tensors |= {key: tensor.cpu() for key, tensor in made.items()}
        advance(next(iter(made)))
    if is_transformers_model(model):
        names = checkpoint_names(model, tensors)
        tensors = {names[key]: tensor for key, tensor in tensors.items()}
    return tensors


def write_aside(model: nn.Module, form: SavedForm, folder: Path) -> None:
    """The packed form of embeddings that are dense in the shards."""
    tensors = {name: tensor.cpu() for name, tensor in packed_aside(model, form).items()}
    if tensors:
        (folder / ASIDE).parent.mkdir()
        save_file(tensors, folder / ASIDE, metadata={"format": "pt"})


def write_report(model: Any, folder: Path) -> None:
    """What happened to every weight, the ranges of activations, and the configuration of another system that asked for it."""
    config = getattr(model, "quantization_config", None)
    if isinstance(config, WeightOnlyConfig):
        config.save_pretrained(folder)
    write_ranges(model, folder)
    (folder / REPORT).write_text(model.lowbit_report.to_json() + "\n", encoding="utf-8")


def _shards(everything: Iterator[Part], limit: int) -> Iterator[list[Part]]:
    """Parts in order, cut where the next would pass the limit."""
    shard: list[Part] = []
    size = 0
    for part in everything:
        if shard and size + part.nbytes > limit:
            yield shard
            shard, size = [], 0
        shard.append(part)
        size += part.nbytes
    if shard:
        yield shard


def _write_config(model: Any, form: SavedForm, folder: Path) -> None:
    config = copy.deepcopy(model.config)
    config.quantization_config = form.fields
    config.architectures = [type(model).__name__]
    config.dtype = str(model.dtype).removeprefix("torch.")
    config.save_pretrained(folder)
    if form.untie:
        write_untied(folder)
    if getattr(model, "generation_config", None) is not None and model.can_generate():
        model.generation_config.save_pretrained(folder)


def write_untied(folder: Path) -> None:
    """Let a written configuration say that head and embedding are separate."""
    fields = json.loads((folder / CONFIG).read_text(encoding="utf-8")) | {"tie_word_embeddings": False}
    if isinstance(fields.get("text_config"), dict):
        fields["text_config"] = fields["text_config"] | {"tie_word_embeddings": False}
    _write_json(folder / CONFIG, fields)


def _write_json(path: Path, fields: dict[str, Any]) -> None:
    path.write_text(json.dumps(fields, indent=1) + "\n", encoding="utf-8")
