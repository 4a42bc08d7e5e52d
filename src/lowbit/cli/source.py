"""Where a model comes from: a Hugging Face folder, a GGUF file, or a name on the hub.

`find_source` only looks: nothing is read but names, so a mistyped path is told before torch is imported.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lowbit.contents import CONFIG, read_config
from lowbit.errors import CheckpointError

# `name` or `owner/name`, as the hub spells them.
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


@dataclass(frozen=True)
class Source:
    """A model that was found. `name` is a path, or its name on the hub."""

    kind: Literal["folder", "gguf", "hub"]
    name: str

    @property
    def path(self) -> Path:
        return Path(self.name)

    def config(self) -> dict[str, Any]:
        """The config.json of a folder; empty for other sources."""
        return read_config(self.path) if self.kind == "folder" else {}


def find_source(text: str) -> Source:
    """What a user's word for a model means."""
    path = Path(text).expanduser()
    if path.is_file():
        return _file_source(path)
    if path.is_dir():
        return _folder_source(path)
    if _may_be_on_hub(text, path):
        return Source("hub", text)
    raise CheckpointError(missing(path))


def _may_be_on_hub(text: str, path: Path) -> bool:
    """Whether a word is more likely a name on the hub than a mistyped path."""
    if not _HUB_NAME.fullmatch(text) or path.suffix in (".gguf", ".safetensors"):
        return False
    owner_is_folder = "/" in text and path.parent.is_dir()
    owner = Path(text.partition("/")[0])
    return not owner_is_folder and _similar_neighbour(path) is None and _similar_neighbour(owner) is None


def missing(path: Path) -> str:
    """The sentence for a path that does not exist."""
    first_absent = next((p for p in (*reversed(path.parents), path) if not p.exists()), path)
    close = _similar_neighbour(first_absent)
    if close is not None:
        return f"there is no file or folder {path}: did you mean {close}?"
    parent = next((p for p in path.parents if p.exists()), Path())
    return f"there is no file or folder {path} (the path is right up to {parent.resolve()})"


def _similar_neighbour(path: Path) -> Path | None:
    """Something that exists beside the path and is called nearly like it."""
    if not path.parent.is_dir():
        return None
    close = difflib.get_close_matches(path.name, [entry.name for entry in path.parent.iterdir()], n=1, cutoff=0.7)
    return path.parent / close[0] if close else None


def _file_source(path: Path) -> Source:
    if path.suffix.lower() == ".gguf":
        return Source("gguf", str(path))
    if path.name == CONFIG or path.suffix == ".safetensors":
        raise CheckpointError(f"{path} is one file of a model: name its folder, {path.parent}")
    raise CheckpointError(f"{path} is no model: name a Hugging Face folder, a .gguf file, or a model of the hub")


def _folder_source(path: Path) -> Source:
    if (path / CONFIG).is_file():
        return Source("folder", str(path))
    files = sorted(path.glob("*.gguf"))
    if files:
        return Source("gguf", str(files[0])) if len(files) == 1 else _ask_which(path, files)
    held = ", ".join(sorted(entry.name for entry in path.iterdir())[:4])
    raise CheckpointError(
        f"the folder {path} is no model: it has no {CONFIG} ({'it holds ' + held if held else 'it is empty'})"
    )


def _ask_which(path: Path, files: list[Path]) -> Source:
    names = ", ".join(file.name for file in files[:4]) + (", ..." if len(files) > 4 else "")
    raise CheckpointError(f"the folder {path} holds {len(files)} GGUF files: name one of them ({names})")
