"""Folders of graphs: where they are, and what is written into them.

find_graph(model_id, keywords)      the folder of a graph, on this disk or fetched from the hub
replace_graph(graph, path)          its two files, put in their places once both are whole
whole_folder(place)                 a folder whose files come into their places once all of them are whole
tell_what_was_done(graph, folder)   openvino_config.json, from what the graph says of itself
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lowbit.checkpoint.companions import travels
from lowbit.checkpoint.hub import fetch_companions, find_model
from lowbit.checkpoint.temporary import TemporaryFolder
from lowbit.contents import GENERATION_CONFIG
from lowbit.errors import CheckpointError
from lowbit.openvino.compress import compression_report, is_compressed
from lowbit.openvino.export import FORMATS, RECIPE, save_graph, write_ov_config
from lowbit.openvino.opening import MODEL, has_graph

_WRITING = ".lowbit-writing-"  # what a killed process leaves of it goes with the next one
# What a folder is exported from: weights in one file, or in several with an index.
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def find_graph(model_id: str | Path, keywords: Mapping[str, Any], name: str = MODEL) -> Path | None:
    """The folder of a graph, here or fetched from the hub; None where the model has to be exported first."""
    path = Path(model_id).expanduser()
    if path.name == name and path.is_file():
        return path.parent
    if path.exists():
        return path if has_graph(path, name) else None
    found = find_model(model_id, keywords)
    if found.files is not None and name in found.files:
        fetch_companions(str(model_id), found.path, _belongs_to_a_graph)
    return found.path if has_graph(found.path, name) else None


def has_source(folder: Path) -> bool:
    """Whether a folder holds the weights of an original."""
    return any((folder / name).is_file() for name in _WEIGHTS)


def _belongs_to_a_graph(file: str) -> bool:
    return file.startswith("openvino_") or file == GENERATION_CONFIG or travels(file)


def replace_graph(model: Any, path: Path) -> None:
    """Write a graph's two files. It may be reading its weights from the very files that it replaces."""
    with whole_folder(path.parent) as beside:
        save_graph(model, beside / path.name)


@contextmanager
def whole_folder(place: str | Path) -> Iterator[Path]:
    """A folder to write into, beside what lies in `place`: its files go there one after the other when the block ends well."""
    target = Path(place).expanduser()
    is_new = not target.exists()
    folder = make_folder(target)
    try:
        with TemporaryFolder(_WRITING, folder) as beside:
            yield beside
            for written in sorted(beside.rglob("*")):
                if written.is_file():
                    to = folder / written.relative_to(beside)
                    to.parent.mkdir(parents=True, exist_ok=True)
                    written.replace(to)
    except OSError as error:
        raise CheckpointError(
            f"{folder} could not be written ({error.strerror}): what lay there is as it was"
        ) from error
    finally:
        if is_new:
            with suppress(OSError):  # not empty: all went well
                folder.rmdir()


def make_folder(place: str | Path) -> Path:
    """A folder to write into, made where it is not there."""
    folder = Path(place).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be a folder ({error.strerror}): name another to write into") from error
    return folder


def tell_what_was_done(graph: Any, folder: Path) -> None:
    """Write into a folder what its graph says of its weights: how they were written, and what `compress_weights` did since."""
    if not graph.has_rt_info(RECIPE) and not is_compressed(graph):
        return
    recipe, formats = "", Counter[str]()
    if graph.has_rt_info(RECIPE):
        recipe = graph.get_rt_info(RECIPE).astype(str)
        formats.update(json.loads(graph.get_rt_info(FORMATS).astype(str)))
    if is_compressed(graph):
        report = compression_report(graph)
        recipe = report.recipe
        formats.update(report.formats())
    write_ov_config(folder, recipe, formats)
