"""A temporary folder that goes with whoever keeps it, and that no killed process leaves for good.

    kept = TemporaryFolder("lowbit-openvino-")      in the system's place for such folders, or `home`
    kept.path                                       gone with `kept`, with the process, or after `with`

A process that is killed removes nothing. Its lock goes with it though, so the next folder of that name clears away those that
nobody holds any more: a model of gigabytes is left lying until then and no longer.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from pathlib import Path
from types import TracebackType

from lowbit.checkpoint.exchange import clear_left, lock_folder


class TemporaryFolder:
    """A folder that is held: `path` lives as long as this object."""

    def __init__(self, prefix: str, home: Path | None = None) -> None:
        place = Path(tempfile.gettempdir()) if home is None else home
        clear_left(place.glob(f"{prefix}*"))
        self.path = Path(tempfile.mkdtemp(prefix=prefix, dir=place))
        self.remove = weakref.finalize(self, _remove, self.path, lock_folder(self.path))

    def __enter__(self) -> Path:
        return self.path

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


def _remove(folder: Path, lock: int | None) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    if lock is not None:
        os.close(lock)
