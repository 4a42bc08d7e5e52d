"""What a name means: something on this disk, or a model of the hub, asked for with one short question.

    a path that exists                                  is taken
    a name that the hub knows                           its config.json is fetched, the rest is transformers' affair
    nobody answers, but the model was fetched before    the copy of then is taken, a folder like any other
    none of these                                       one sentence, with what lies here under a similar name

A word that is no folder is most often a mistyped one, and without this question transformers asks the hub for half a
minute before it says so. What lies here under a similar name decides nothing, it is only told: a folder `gpt2-int4`
must not hide the hub's `gpt2`, nor a folder `Qwen` all models of that owner.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError

from lowbit.contents import CONFIG, is_hub_name, missing
from lowbit.errors import CheckpointError, one_line

_SECONDS = 5
# The errors of whichever HTTP library the hub's client stands on, the system's, and those about a name's spelling.
_ERRORS = cast(tuple[type[Exception], ...], (*HfHubHTTPError.__bases__, ValueError))
# What a folder that is read by lowbit itself consists of.
_LOADED = (".json", ".safetensors", ".py")
# transformers' keywords that say whose copy of a model is meant.
_WHICH = ("revision", "cache_dir", "token", "local_files_only")


@dataclass(frozen=True)
class Found:
    """Where a model lies. Of one that is still on the hub, `files` is what the hub has, and at `path` is its config.json alone."""

    path: Path
    files: tuple[str, ...] | None = None

    @property
    def is_on_hub(self) -> bool:
        return self.files is not None


def find_model(name: str | Path, keywords: Mapping[str, Any]) -> Found:
    """What the name of a model means, for the keywords of a `from_pretrained`."""
    path = Path(name).expanduser()
    if path.exists():
        return Found(path)
    if isinstance(name, Path):
        raise CheckpointError(missing(path))
    gguf, subfolder = keywords.get("gguf_file"), keywords.get("subfolder")
    file = gguf or (f"{subfolder}/{CONFIG}" if subfolder else CONFIG)
    which = {key: keywords[key] for key in _WHICH if keywords.get(key) is not None}
    found = look_up(name, file, which)
    if found.files is None:
        return found
    if file not in found.files:
        if gguf:
            raise CheckpointError(f"the hub's {name} has no file {gguf}")
        return found
    folder = _folder_of(huggingface_hub.hf_hub_download(name, file, **which), file)
    return Found(folder) if gguf else Found(folder, found.files)


def look_up(name: str, file: str = CONFIG, which: Mapping[str, Any] | None = None) -> Found:
    """A model of the hub, or the copy of it that holds `file` and was fetched before, where the hub does not answer."""
    if not is_hub_name(name):
        raise CheckpointError(missing(Path(name)))
    which = which or {}
    reason = "was not to be asked (local_files_only)"
    if not which.get("local_files_only"):
        try:
            return Found(Path(name), _ask(name, which.get("revision"), which.get("token")))
        except _ERRORS as error:
            said = "has no such model for you" if isinstance(error, HfHubHTTPError) else "does not answer"
            reason = f"{said}: {one_line(str(error))}"
    given = {key: which[key] for key in ("revision", "cache_dir") if key in which}
    found = huggingface_hub.try_to_load_from_cache(name, file, **given)
    if isinstance(found, str):
        return Found(_folder_of(found, file))
    raise CheckpointError(f"{missing(Path(name))}, and the hub {reason}")


@functools.cache
def _ask(name: str, revision: str | None, token: str | bool | None) -> tuple[str, ...]:
    """The files of a model."""
    info = huggingface_hub.model_info(name, revision=revision, token=token, timeout=_SECONDS)
    return tuple(file.rfilename for file in info.siblings or ())


def home_of(name: str) -> Path | None:
    """The folder in the cache of a model of the hub that was fetched, of its main line."""
    config = huggingface_hub.try_to_load_from_cache(name, CONFIG) if is_hub_name(name) else None
    return _folder_of(config, CONFIG) if isinstance(config, str) else None


def fetch_weights(name: str, files: Iterable[str], keywords: Mapping[str, Any]) -> None:
    """Fetch what a model of the hub is loaded from (weights, configurations, code of its own) beside its config.json.

    What lies in folders beside it is of other forms of the model, and is not read.
    """
    which = {key: keywords[key] for key in _WHICH if keywords.get(key) is not None}
    inside = f"{keywords['subfolder']}/" if keywords.get("subfolder") else ""
    for file in files:
        if file.startswith(inside) and file.endswith(_LOADED) and "/" not in file.removeprefix(inside):
            huggingface_hub.hf_hub_download(name, file, **which)


def fetch_companions(name: str, home: Path, wanted: Callable[[str], bool]) -> None:
    """Fetch those files of a model of the hub that are `wanted` into its folder in the cache, which is called as its commit.

    Where the hub does not answer there is what was fetched with the weights, and a warning.
    """
    try:
        for file in filter(wanted, _ask(name, home.name, None)):
            huggingface_hub.hf_hub_download(name, file, revision=home.name, cache_dir=home.parents[2])
    except _ERRORS as error:
        warnings.warn(
            f"what belongs to {name} beside its weights (tokenizer, processor, code) could not be fetched to be saved with it: "
            f"{one_line(str(error))}",
            stacklevel=4,
        )


def _folder_of(fetched: str, file: str) -> Path:
    """The folder of a model, from where one file of it lies."""
    return Path(fetched.removesuffix(file))
