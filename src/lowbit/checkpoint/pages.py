"""Give back the memory of a checkpoint that has been read.

safetensors maps its files into memory. Pages that were read count as the process's own until they are unmapped, which
transformers does when all is loaded: by then a 2.2 GB checkpoint weighs 2.2 GB beside its packed copy. The pages are
clean copies of the file, so the kernel may take them back at any time (`madvise` with MADV_DONTNEED) and reads them
again if somebody asks. Linux only; elsewhere nothing happens and loading takes the more memory.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterable
from pathlib import Path

_DONT_NEED = 4
# Giving back takes a look at the process's mappings, so it waits until this much has been read.
_STEP_BYTES = 128 << 20
_read_since = 0


def release_pages(files: Iterable[str], just_read: int) -> None:
    """Give back the pages of these files, if enough was read since the last time."""
    global _read_since
    _read_since += just_read
    if _read_since < _STEP_BYTES or sys.platform != "linux":
        return
    _read_since = 0
    names = {str(Path(file).resolve()) for file in files}
    libc = ctypes.CDLL(None, use_errno=True)
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        # address-range permissions offset device inode path
        fields = line.split(maxsplit=5)
        # A private mapping that can be written may hold changes that are not in the file.
        if len(fields) == 6 and fields[5] in names:
            start, end = (int(part, 16) for part in fields[0].split("-"))
            libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _DONT_NEED)
