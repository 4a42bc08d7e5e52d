"""A prompt's cache in a file: what a long prompt cost to read is paid once, and not at every start.

    file = safetensors {tokens int32 [n], cache uint8 [bytes]}, with the model's fingerprint and the type of the cache beside them

`read` brings a slot to what the file holds of a prompt, `write` puts the prompt's own state there. The bytes are the
engine's, for this model and this type of cache alone; a file of another model is refused with a sentence, since its
keys and values would make nonsense of every answer. A file is written beside its place and moved there, so that nobody
ever meets half of one.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from lowbit.errors import CheckpointError, LowbitError
from lowbit.runtime.slots import Slot, Tokens

KIND, VERSION = "lowbit_prompt_cache", "1"


class SavingEngine(Protocol):
    """What an engine must offer for its slots to be saved."""

    @property
    def identity(self) -> dict[str, str]:
        """What must be equal for a saved slot to be taken up: names and values, as strings."""
        ...

    def save(self, slot: int = 0, length: int | None = None) -> NDArray[np.uint8]: ...
    def restore(self, saved: NDArray[np.uint8], length: int, slot: int = 0) -> None: ...


class PromptCache:
    """One file."""

    def __init__(self, path: Path) -> None:
        self.path = path.expanduser()
        self._held: Tokens = np.empty(0, np.int32)

    def read(self, slot: Slot, prompt: Tokens) -> None:
        """Bring a slot to what the file holds of a prompt, where that is more than it has.

        What can be known to fail when the file is written, after the whole prompt was read, fails here.
        """
        if self.path.is_dir():
            raise CheckpointError(f"{self.path} is a folder: name a file for the prompt cache")
        if not self.path.exists():
            above = next(parent for parent in self.path.absolute().parents if parent.exists())
            if not (above.is_dir() and os.access(above, os.W_OK)):
                raise CheckpointError(
                    f"the prompt cache {self.path} cannot be written: name a file in a folder of yours"
                )
            return
        engine = _saving(slot)
        tokens, cache = self._load(engine.identity)
        self._held = tokens
        if _same_start(tokens, prompt) <= slot.common(prompt):
            return
        slot.clear()
        try:
            engine.restore(cache, len(tokens), slot.number)
        except LowbitError as error:
            raise CheckpointError(f"the prompt cache {self.path} cannot be taken up: {error}") from None
        slot.hold(tokens)

    def write(self, slot: Slot, prompt: Tokens) -> None:
        """Save the state after a prompt that a slot has read, unless the file holds it already."""
        if _same_start(self._held, prompt) == len(prompt):
            return
        engine = _saving(slot)
        cache = engine.save(slot.number, len(prompt))
        about = {"kind": KIND, "version": VERSION, **engine.identity}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(prefix=f".{self.path.name}.", dir=self.path.parent)
        except OSError as error:
            raise CheckpointError(f"the prompt cache {self.path} was not written: {error.strerror}") from None
        os.close(handle)
        try:
            save_file({"tokens": np.ascontiguousarray(prompt, np.int32), "cache": cache}, name, about)
            Path(name).replace(self.path)
        except SafetensorError as error:  # its name for whatever the disk refuses
            raise CheckpointError(f"the prompt cache {self.path} was not written: {error}") from None
        finally:
            Path(name).unlink(missing_ok=True)

    def _load(self, identity: dict[str, str]) -> tuple[Tokens, NDArray[np.uint8]]:
        try:
            with safe_open(self.path, framework="numpy") as file:
                about = file.metadata() or {}
                if about.get("kind") != KIND:
                    raise CheckpointError(f"{self.path} is no prompt cache: name another file, or remove it")
                for name, value in {"version": VERSION, **identity}.items():
                    if about.get(name) != value:
                        raise CheckpointError(
                            f"the prompt cache {self.path} {_difference(name, about.get(name), value)}"
                        )
                return file.get_tensor("tokens"), file.get_tensor("cache")
        except (SafetensorError, OSError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(
                f"{self.path} is no prompt cache, or a damaged one ({error}): name another file, or remove it"
            ) from None


def _difference(name: str, found: str | None, own: str) -> str:
    """What is said of a file that another engine made. Its bytes are taken as they are or not at all: no other type brings back
    what int8 has lost, and the same prompt would have one answer from the file and another without."""
    if name == "cache_type" and found is not None:
        return (
            f"holds keys and values in {found}, and this engine keeps {own}: load the model with cache={found!r} "
            f"(--cache {found}), or name another file"
        )
    return f"was made with another {name.replace('_', ' ')}: name another file, or remove it"


def _saving(slot: Slot) -> SavingEngine:
    if not hasattr(slot.engine, "restore"):
        raise LowbitError("this engine cannot save its cache")
    return cast(SavingEngine, cast(Any, slot.engine))


def _same_start(first: Tokens, second: Tokens) -> int:
    length = min(len(first), len(second))
    different = np.flatnonzero(first[:length] != second[:length])
    return int(different[0]) if len(different) else length
