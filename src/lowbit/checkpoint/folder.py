"""Folders of models: whether one can be loaded, and how a new one takes its place.

`check_folder` reads headers only (`contents` has the reading), so a truncated download is one sentence before anything
is loaded, not an error from deep inside a loader.

`replace_folder` gives its caller a temporary folder beside the target, which takes its name at the end (see
`exchange.py`). Whatever interrupts the writing, the target is either the old folder or the new one.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lowbit.checkpoint.exchange import beside
from lowbit.contents import (
    CONFIG,
    OWN_CONFIG,
    REPORT,
    StoredTensor,
    file_names,
    missing,
    no_weights,
    pickles_alone,
    quantization_config,
    read_config,
    read_generation_config,
    read_json,
    read_tensors,
)
from lowbit.errors import CheckpointError
from lowbit.methods import OWN_METHOD

# The integers among safetensors' types, and booleans.
_INTEGERS = ("I", "U", "BOOL")


def quantization_fields(folder: Path) -> dict[str, Any] | None:
    """What a folder says about how it is quantised, or None when it is not."""
    return (
        quantization_config(read_json(folder / CONFIG))
        if (folder / CONFIG).exists()
        else read_json(folder / OWN_CONFIG)
    )


def check_folder(folder: Path) -> None:
    """Refuse a folder that is not a model, or whose safetensors are not whole."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder" if folder.exists() else missing(folder))
    if (folder / CONFIG).exists() or not (folder / OWN_CONFIG).exists():
        read_config(folder)
    read_generation_config(folder)
    if not pickles_alone(file_names(folder)):
        tensors = read_tensors(folder)
        if quantization_fields(folder) is None:
            _refuse_codes(folder, tensors)


def _refuse_codes(folder: Path, tensors: Iterable[StoredTensor]) -> None:
    """Refuse integers where weights are to be: codes of some method, which would be taken for the numbers themselves."""
    for tensor in tensors:
        if tensor.name.endswith(".weight") and len(tensor.shape) > 1 and tensor.dtype.startswith(_INTEGERS):
            raise CheckpointError(
                f"{folder}: {tensor.name} holds {tensor.dtype} codes, and {CONFIG} does not say how they are quantised: "
                "get the whole folder again, or start from the model in full precision"
            )


def refuse_pickles(model: str | Path, names: Iterable[str]) -> None:
    """Refuse a model whose weights are pickles, by the names of its files."""
    if pickles_alone(names := list(names)):
        raise CheckpointError(no_weights(model, names))


@contextmanager
def replace_folder(target: Path) -> Iterator[Path]:
    """A temporary folder that becomes `target` if the block ends well, and vanishes if it does not."""
    target = _followed(target)
    refuse_to_replace_others(target)
    with _exchanged(target) as temporary:
        yield temporary


def _followed(target: Path) -> Path:
    """Where a path leads: a link stays a link to the folder that is replaced."""
    return Path(os.path.realpath(target))  # Path.resolve raises an error of its own for a link to itself


def refuse_to_replace_others(target: Path) -> None:
    """Refuse a folder that holds something else than a model which lowbit wrote."""
    if target.is_dir() and any(target.iterdir()) and not ((target / CONFIG).exists() or (target / OWN_CONFIG).exists()):
        raise CheckpointError(
            f"cannot save to {target}: it holds files that are not a model; choose a new or empty folder"
        )
    if (target / CONFIG).exists() and not _is_ours(target):
        raise CheckpointError(
            f"cannot save to {target}: it holds a model that lowbit did not write; choose another folder"
        )


@contextmanager
def update_folder(target: Path, outdated: Callable[[str], bool]) -> Iterator[Path]:
    """The same for a writer that leaves the rest of a folder alone: what `target` holds besides is taken along, unless `outdated`.

    Files are taken along as links to the same bytes, so the price is that of their names where there are links.
    """
    target = _followed(target)
    with _exchanged(target) as temporary:
        yield temporary
        for path in sorted(target.iterdir()) if target.exists() else ():
            if (temporary / path.name).exists() or outdated(path.name):
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.copytree(path, temporary / path.name, symlinks=True, copy_function=_take_along)
            else:
                _take_along(path, temporary / path.name)


def _take_along(source: str | Path, target: str | Path) -> None:
    """A file under a second name; a copy where the file system has no links."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
            raise
        shutil.copy2(source, target, follow_symlinks=False)


@contextmanager
def _exchanged(target: Path) -> Iterator[Path]:
    """`exchange.beside`, with the sentence of a save for what the system refuses."""
    file = next((place for place in (target, *target.parents) if place.is_file()), None)
    if file is not None:
        raise CheckpointError(
            f"cannot save to {target}: {'it' if file == target else file} is a file; name another folder"
        )
    if target.is_mount():
        raise CheckpointError(
            f"cannot save to {target}: it is a mount point; name a folder below it, {target / 'model'}"
        )
    try:
        with beside(target) as temporary:
            yield temporary
    except OSError as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(unwritten(target, error)) from error


def unwritten(target: Path, error: Exception) -> str:
    """The sentence for a save that broke off."""
    no_room = os.strerror(errno.ENOSPC)
    reason = (isinstance(error, OSError) and error.strerror) or str(error)
    if no_room in reason:
        reason = "the disk is full; free some room, or name a folder on another disk"
    return f"cannot save to {target}: {reason}; nothing was changed there"


def _is_ours(folder: Path) -> bool:
    """Whether lowbit wrote what a folder holds."""
    if (folder / REPORT).exists() or (folder / OWN_CONFIG).exists():
        return True
    quantization = quantization_config(read_json(folder / CONFIG)) or {}
    return OWN_METHOD in (quantization.get("quant_method"), *quantization)
