"""Resume: finished blocks are kept in a folder, so that a run that was killed goes on where it stopped.

run.json             the recipe, the calibration, the model: a run with others is refused
block_0007.json      the lines of the report, and the format of every packed weight; written last, so it means "finished"
block_0007.safetensors   every tensor of the finished block
hidden_0007.safetensors  what the blocks after it are called with; only the latest is kept

Whether a folder can be resumed is known before the first block runs; whatever ends a run, a full disk too, leaves finished
blocks behind and nothing half-written.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from lowbit.calibration import Calibration
from lowbit.contents import read_json
from lowbit.errors import CheckpointError, RecipeError, one_line
from lowbit.formats import format_from_name
from lowbit.layers import PackedWeight
from lowbit.models.walk import Target, up_name
from lowbit.packing import BUFFERS, PackedTensor
from lowbit.recipe import Recipe
from lowbit.report import LayerReport
from lowbit.swap import low_bit_module, replace_module

_RUN = "run.json"
_SAMPLED = 64
# Fields of a recipe that are patterns, and how many letters of a refusal each recipe has.
_LONG = ("overrides", "notes")
_DESCRIBED = 80


def model_digest(model: nn.Module) -> str:
    """A name for these very weights: every shape, and some numbers of every weight."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        digest.update(f"{name} {list(parameter.shape)}".encode())
        digest.update(flat[:: max(len(flat) // _SAMPLED, 1)].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def finished_blocks(folder: Path) -> int:
    """How many blocks of a run a folder holds."""
    return next(count for count in itertools.count() if not _file_of(folder, "block", count, "json").exists())


def _file_of(folder: Path, kind: str, index: int, suffix: str) -> Path:
    return folder / f"{kind}_{index:04d}.{suffix}"


class ResumeFolder:
    """The finished blocks of one run."""

    def __init__(self, path: Path, model: nn.Module, recipe: Recipe, calibration: Calibration) -> None:
        self.path = path
        self.asked = {
            "recipe": recipe.to_dict(),
            "calibration": str(calibration),
            "digest": calibration.digest,
            "model": model_digest(model),
        }
        if path.exists() and not path.is_dir():
            raise RecipeError(f"{path} is a file: name a folder to resume from")
        if (path / _RUN).exists():
            _check_same(path, read_json(path / _RUN), self.asked)
        elif path.exists() and any(path.iterdir()):
            raise RecipeError(f"{path} holds something else than an interrupted run: name another folder")
        path.mkdir(parents=True, exist_ok=True)

    def begin(self) -> None:
        """Say whose blocks these are."""
        _write(self.path / _RUN, self.asked)

    @property
    def finished(self) -> int:
        """How many blocks are done."""
        return finished_blocks(self.path)

    def save_block(self, index: int, name: str, model: nn.Module, rows: list[LayerReport], hidden: _Hidden) -> None:
        """Keep a finished block and what the next is called with."""
        block = model.get_submodule(name)
        tensors = {key: value.detach().contiguous().clone() for key, value in block.state_dict().items()}
        _save(self._file("block", index, "safetensors"), tensors)
        _save(self._file("hidden", index, "safetensors"), {k: v.detach().contiguous() for k, v in hidden.items()})
        held = {k: m.format.name for k, m in block.named_modules() if isinstance(m, PackedWeight)}
        shapes = {k: list(m.shape) for k, m in block.named_modules() if isinstance(m, PackedWeight)}
        fields = {"name": name, "formats": held, "shapes": shapes, "rows": [dataclasses.asdict(row) for row in rows]}
        _write(self._file("block", index, "json"), fields)
        if index:
            self._file("hidden", index - 1, "safetensors").unlink(missing_ok=True)

    def hidden(self, index: int, device: torch.device) -> _Hidden:
        """What the block after a finished one is called with."""
        return _load(self._file("hidden", index, "safetensors"), device)

    def restore_block_(self, index: int, name: str, model: nn.Module, targets: list[Target]) -> list[LayerReport]:
        """Put a finished block in place; returns its lines of the report."""
        fields = read_json(self._file("block", index, "json"))
        file = self._file("block", index, "safetensors")
        if fields.get("name") != name or not file.is_file():
            raise CheckpointError(_damaged(file))
        block = model.get_submodule(name)
        device = next(block.parameters()).device
        tensors = _load(file, device)
        for target in targets:
            inner = target.path.removeprefix(f"{name}.")
            places = [f"{inner}.packed_weight"]
            if target.role == "experts":
                places = [f"{inner}.{up_name(target.module)}", f"{inner}.down_proj"]
            if places[0] not in fields["formats"]:
                continue
            dtype = next(target.module.parameters()).dtype
            weights = [_packed(place, fields, tensors, dtype) for place in places]
            replace_module(model, target.path, low_bit_module(target, weights))
        dense = dict(block.named_parameters()) | dict(block.named_buffers())
        with torch.no_grad():
            for key, value in tensors.items():
                if key in dense and key.rpartition(".")[2] not in BUFFERS:
                    dense[key].copy_(value)
        return [LayerReport(**row) for row in fields["rows"]]

    def _file(self, kind: str, index: int, suffix: str) -> Path:
        return _file_of(self.path, kind, index, suffix)


_Hidden = dict[str, torch.Tensor]


def _packed(place: str, fields: dict[str, Any], tensors: _Hidden, dtype: torch.dtype) -> PackedWeight:
    parts = {name: tensors[f"{place}.{name}"] for name in BUFFERS if f"{place}.{name}" in tensors}
    format = format_from_name(fields["formats"][place])
    return PackedWeight(PackedTensor(format, tuple(fields["shapes"][place]), **parts), dtype)


def _check_same(path: Path, found: Any, asked: dict[str, Any]) -> None:
    """Refuse a run that is not the one which was begun, naming both."""
    if not isinstance(found, dict) or not isinstance(found.get("recipe"), dict):
        raise CheckpointError(f"{path / _RUN} is damaged: begin again in another folder")
    first, second = _apart(found["recipe"], asked["recipe"])
    if first:
        raise RecipeError(
            f"{path} was begun with the recipe {_describe(found['recipe'], first)} and cannot be resumed with "
            f"{_describe(asked['recipe'], second)}: name another folder, or use the first recipe again"
        )
    if found.get("digest") != asked["digest"]:
        raise RecipeError(
            f"{path} was begun with the calibration {found.get('calibration')} and cannot be resumed with "
            f"{asked['calibration']}: name another folder, or use the first text, samples and length again"
        )
    if found.get("model") != asked["model"]:
        raise RecipeError(f"{path} was begun with another model than this one: name another folder")


def _apart(first: dict[str, Any], second: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What each of two says where they differ, long fields last; of options only those that do."""
    one, other = {}, {}
    for key in sorted(first.keys() | second.keys(), key=lambda key: (key in _LONG, key)):
        here, there = first.get(key), second.get(key)
        if isinstance(here, dict) and isinstance(there, dict):
            here, there = _apart(here, there)
        if here != there:
            one[key], other[key] = here, there
    return one, other


def _describe(recipe: dict[str, Any], fields: dict[str, Any]) -> str:
    """The name of a saved recipe, and its fields that matter here: so many that both fit into one sentence."""
    said = json.dumps(fields)
    said = said if len(said) <= _DESCRIBED else f"{said[:_DESCRIBED]}..."
    return f"{recipe.get('name', recipe.get('linear'))} ({said})"


def _damaged(path: Path) -> str:
    return f"{path} is damaged or of another model: begin again in another folder"


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A file that takes the place of another once it is whole, and of which nothing is left if it never is."""
    temporary = path.with_suffix(".part")
    try:
        yield temporary
        temporary.replace(path)
    except (OSError, SafetensorError) as error:  # the second is safetensors' name for whatever the disk refuses
        reason = (isinstance(error, OSError) and error.strerror) or one_line(str(error)).rstrip(".")
        raise CheckpointError(
            f"{path} was not written ({reason}): see to its disk; finished blocks are kept, and the same run goes on there"
        ) from None
    finally:
        temporary.unlink(missing_ok=True)


def _write(path: Path, fields: dict[str, Any]) -> None:
    with _replacing(path) as temporary:
        temporary.write_text(json.dumps(fields, indent=1), encoding="utf-8")


def _save(path: Path, tensors: _Hidden) -> None:
    with _replacing(path) as temporary:
        save_file(tensors, temporary)


def _load(path: Path, device: torch.device) -> _Hidden:
    try:
        found: _Hidden = load_file(path, device=str(device))
    except (SafetensorError, FileNotFoundError):
        raise CheckpointError(_damaged(path)) from None
    return found
