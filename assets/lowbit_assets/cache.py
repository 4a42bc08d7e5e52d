"""Folders that are built once and kept.

A folder's name ends in a digest of everything that decides its content, so what an older version built is not found
again; folders of the same stem that nobody opened for a day are then removed. A build happens under a temporary name
that is renamed when it is complete: there is never a half-built folder under the real name.
"""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

SECONDS_UNUSED = 24 * 3600.0
DIGEST_CHARACTERS = 12


def cache_directory() -> Path:
    """Where the assets are kept unless the caller names a directory: the XDG cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lowbit" / "assets"


def cached_folder(stem: str, versions: dict[str, object], build: Callable[[Path], None], cache: Path | None) -> Path:
    """The folder `stem-<digest of versions>` of the cache; `build(folder)` fills it if it is not there yet."""
    digest = hashlib.sha256(json.dumps(versions, sort_keys=True).encode()).hexdigest()[:DIGEST_CHARACTERS]
    parent = cache or cache_directory()
    folder = parent / f"{stem}-{digest}"
    if not folder.is_dir():
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{stem}-", dir=parent) as name:
            unfinished = Path(name) / "folder"
            unfinished.mkdir()
            build(unfinished)
            try:
                unfinished.rename(folder)
            except OSError:  # somebody else built it meanwhile, from the same versions
                if not folder.is_dir():
                    raise
        remove_unused(parent, stem, keep=folder)
    with contextlib.suppress(PermissionError):  # a cache that somebody else owns can be read all the same
        os.utime(folder)
    return folder


def remove_unused(parent: Path, stem: str, keep: Path) -> None:
    for other in parent.glob(f"{stem}-{'?' * DIGEST_CHARACTERS}"):
        with contextlib.suppress(FileNotFoundError):  # another process removes it too
            if other != keep and time.time() - other.stat().st_mtime > SECONDS_UNUSED:
                shutil.rmtree(other)


def files_digest(*paths: Path) -> str:
    """One digest of the content of several files, for what is built from them or by them."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(paths))).hexdigest()


def seed_of(*parts: object) -> int:
    """A seed that depends on nothing but its parts, so every tensor can be drawn alone and in any order."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:8], "little")
