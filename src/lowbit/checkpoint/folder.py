"""Folders of models: what is in one, whether it is whole, and how a new one takes its place.

`check_folder` reads headers only: every safetensors file must be as long as its header says, and every file that the
index names must exist. So a truncated download is one sentence before anything is loaded, not an error from deep
inside a loader.

`replace_folder` gives its caller a temporary folder beside the target and renames it at the end. Whatever interrupts
the writing, the target is either the old folder or the new one.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lowbit.errors import CheckpointError
from lowbit.methods import OWN_METHOD

CONFIG = "config.json"
OWN_CONFIG = "lowbit.json"
REPORT = "lowbit_report.json"
INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"
_LENGTH_BYTES = 8
# A header is JSON of names and offsets; one of more than this is a file of another kind.
_LARGEST_HEADER = 1 << 28
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} is not a model folder: it has no {path.name}") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); the file is damaged, get it again") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no JSON object; the file is damaged, get it again")
    return value


def quantization_fields(folder: Path) -> dict[str, Any] | None:
    """What a folder says about how it is quantised, or None when it is not."""
    if (folder / CONFIG).exists():
        fields = read_json(folder / CONFIG)
        found = fields.get("quantization_config") or (fields.get("text_config") or {}).get("quantization_config")
        return found if isinstance(found, dict) else None
    return read_json(folder / OWN_CONFIG)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder, each looked at and found whole."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder" if folder.exists() else f"there is no folder {folder}")
    if (folder / WEIGHTS).exists():
        names = [WEIGHTS]
    elif (folder / INDEX).exists():
        names = sorted(set(read_json(folder / INDEX).get("weight_map", {}).values()))
    else:
        names = sorted(path.name for path in folder.glob("*.safetensors"))
    if not names:
        raise CheckpointError(_no_weights(folder))
    for name in names:
        check_safetensors(folder / name)
    return [folder / name for name in names]


def check_folder(folder: Path) -> None:
    """Refuse a folder that is not a model, or whose safetensors are not whole."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder" if folder.exists() else f"there is no folder {folder}")
    if not (folder / CONFIG).exists() and not (folder / OWN_CONFIG).exists():
        raise CheckpointError(f"{folder} is not a model folder: it has no {CONFIG}")
    if (folder / CONFIG).exists() and not read_json(folder / CONFIG).get("model_type"):
        raise CheckpointError(f"{folder / CONFIG} names no model_type, so it does not describe a model")
    if not has_only_pickles(folder):
        weight_files(folder)


def has_only_pickles(folder: Path) -> bool:
    """Whether a folder's weights are pickles and nothing else."""
    return not list(folder.glob("*.safetensors")) and any((folder / name).exists() for name in _PICKLES)


def _no_weights(folder: Path) -> str:
    if has_only_pickles(folder):
        return (
            f"the weights in {folder} are pickles, which can run code when they are loaded; "
            "convert them to safetensors, or pass allow_pickle=True (--allow-pickle) if you trust their source"
        )
    return f"{folder} holds no weights: there is neither {WEIGHTS} nor {INDEX}"


def refuse_pickles(folder: Path) -> None:
    """Refuse a folder whose weights are pickles."""
    if has_only_pickles(folder):
        raise CheckpointError(_no_weights(folder))


def check_safetensors(path: Path) -> dict[str, Any]:
    """The header of a safetensors file, if the file is whole."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(_LENGTH_BYTES)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == _LENGTH_BYTES else 0
            if not 0 < length <= min(_LARGEST_HEADER, size - _LENGTH_BYTES):
                raise CheckpointError(
                    f"{path} is truncated or no safetensors file: it has {size} bytes and no whole header"
                )
            header = json.loads(file.read(length))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; the folder's index names it, get it again") from None
    except (UnicodeDecodeError, json.JSONDecodeError):
        raise CheckpointError(f"{path} is no safetensors file: its header cannot be read") from None
    entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
    end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    if size != _LENGTH_BYTES + length + end:
        raise CheckpointError(
            f"{path} is truncated: it should have {_LENGTH_BYTES + length + end} bytes and has {size}"
        )
    return entries


@contextmanager
def replace_folder(target: Path) -> Iterator[Path]:
    """A temporary folder that becomes `target` if the block ends well, and vanishes if it does not."""
    target = target.resolve()  # a link stays a link to the folder that is replaced
    if target.is_file():
        raise CheckpointError(f"cannot save to {target}: it is a file")
    if target.is_dir() and any(target.iterdir()) and not ((target / CONFIG).exists() or (target / OWN_CONFIG).exists()):
        raise CheckpointError(
            f"cannot save to {target}: it holds files that are not a model; choose a new or empty folder"
        )
    if (target / CONFIG).exists() and not _is_ours(target):
        raise CheckpointError(
            f"cannot save to {target}: it holds a model that lowbit did not write; choose another folder"
        )
    temporary = target.with_name(f".{target.name}.partial-{os.getpid()}")
    aside = target.with_name(f".{target.name}.old-{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if target.exists():
            target.rename(aside)
        temporary.rename(target)
    except OSError as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"cannot save to {target}: {error.strerror or error}; nothing was changed there"
        ) from error
    finally:
        if aside.exists() and not target.exists():  # interrupted between the two renames
            aside.rename(target)
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(aside, ignore_errors=True)


def _is_ours(folder: Path) -> bool:
    """Whether lowbit wrote what a folder holds."""
    names = ("lowbit_report.json", OWN_CONFIG)
    fields = json.loads((folder / CONFIG).read_text(encoding="utf-8")) if (folder / CONFIG).exists() else {}
    quantization = fields.get("quantization_config") or {} if isinstance(fields, dict) else {}
    return any((folder / name).exists() for name in names) or OWN_METHOD in (
        quantization.get("quant_method"),
        *quantization,
    )
