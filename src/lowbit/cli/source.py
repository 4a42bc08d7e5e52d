"""Where a model comes from: a Hugging Face folder, a GGUF file, or a name on the hub.

`find_source` only looks: nothing is read but names, and the hub is asked whether it has the model, so a mistyped path is
told before torch is imported.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lowbit.contents import CONFIG, OWN_CONFIG, gguf_in, is_gguf, is_hub_name, missing, read_config
from lowbit.errors import CheckpointError, check_text


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
    if not text.strip():
        raise CheckpointError(
            "the name of the model is empty: name a Hugging Face folder, a .gguf file, or a model of the hub"
        )
    path = Path(check_text(text, "the name of the model")).expanduser()
    if path.is_file():
        return _file_source(path)
    if path.is_dir():
        return _folder_source(path)
    if path.exists():
        raise CheckpointError(f"{path} is neither a file nor a folder: name a Hugging Face folder or a .gguf file")
    if path.is_symlink():
        raise CheckpointError(missing(path))
    if is_hub_name(text):
        from lowbit.checkpoint.hub import look_up

        found = look_up(text)
        return Source("hub", text) if found.is_on_hub else Source("folder", str(found.path))
    raise CheckpointError(missing(path))


def _file_source(path: Path) -> Source:
    if is_gguf(path):
        return Source("gguf", str(path))
    if path.name == CONFIG or path.suffix == ".safetensors":
        raise CheckpointError(f"{path} is one file of a model: name its folder, {path.parent}")
    raise CheckpointError(f"{path} is no model: name a Hugging Face folder, a .gguf file, or a model of the hub")


def _folder_source(path: Path) -> Source:
    if (path / CONFIG).is_file():
        return Source("folder", str(path))
    gguf = gguf_in(path)
    if gguf is not None:
        return Source("gguf", str(gguf))
    if (path / OWN_CONFIG).is_file():
        raise CheckpointError(
            f"the folder {path} holds a torch module of yours and no language model: load it in Python with lowbit.load_low_bit"
        )
    held = ", ".join(sorted(entry.name for entry in path.iterdir())[:4])
    raise CheckpointError(
        f"the folder {path} is no model: it has no {CONFIG} ({'it holds ' + held if held else 'it is empty'})"
    )
