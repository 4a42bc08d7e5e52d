"""A folder that is written beside its place and takes the place at one stroke.

    with beside(target) as temporary: ...       what is written there is `target` when the block ends well, else gone

On Linux the kernel exchanges the two names in one call (renameat2), so that not even a power cut finds the place empty.
On a file system without that call there are two renames, and the old folder comes back if the second one fails.

A process that was killed leaves its temporary folder, as large as a model; the next save to the same place clears it
away. A folder that is being written is locked, which tells it from one that was left.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import glob
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

_HERE = -100  # AT_FDCWD: paths are what they are everywhere else
_EXCHANGE = 2  # RENAME_EXCHANGE
_UNKNOWN_CALL = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)
# Between its making and its lock a folder looks like a leftover, but not like one of this age.
_LEFT_SECONDS = 60.0


@contextmanager
def beside(target: Path) -> Iterator[Path]:
    """A temporary folder that becomes `target` if the block ends well, and vanishes if it does not."""
    target.parent.mkdir(parents=True, exist_ok=True)
    clear_left(target.parent.glob(f"{glob.escape(_stem(target))}*"))
    temporary = target.with_name(f"{_stem(target)}{os.getpid()}-{_unlike_others()}")
    temporary.mkdir()
    lock = lock_folder(temporary)
    try:
        yield temporary
        if target.exists():
            exchange(temporary, target)
        else:
            temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # after an exchange it is the old folder
        if lock is not None:
            os.close(lock)


def exchange(one: Path, other: Path) -> None:
    """Let two folders change their names."""
    if not _exchange_at_once(one, other):
        aside = one.with_name(f".{other.name}.old-{_unlike_others()}")
        try:
            other.rename(aside)
            one.rename(other)
        finally:
            if aside.exists():
                aside.rename(one if other.exists() else other)


def _exchange_at_once(one: Path, other: Path) -> bool:
    """The same in one step, where the system can."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        return False
    if libc.renameat2(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _UNKNOWN_CALL:
        return False
    raise OSError(number, os.strerror(number), str(other))


def clear_left(folders: Iterable[Path]) -> None:
    """Remove those of some temporary folders that killed processes left."""
    for path in folders:
        with contextlib.suppress(OSError):  # somebody else clears away too, or is at work
            is_old = time.time() - path.stat().st_mtime > _LEFT_SECONDS
            lock = lock_folder(path) if is_old else None
            if lock is not None:
                shutil.rmtree(path, ignore_errors=True)
                os.close(lock)


def _unlike_others() -> str:
    return os.urandom(4).hex()


def _stem(target: Path) -> str:
    return f".{target.name}.partial-"


def lock_folder(folder: Path) -> int | None:
    """A handle that holds a folder's lock until it is closed, or its process is gone; None if another process has it.

    None too where the file system has no locks: there nothing is ever taken for a leftover.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        return None
    return handle
