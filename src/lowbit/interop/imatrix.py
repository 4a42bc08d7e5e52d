"""llama.cpp's importance matrix: how much each input of a weight matters, as `llama-imatrix` wrote it before it wrote GGUF.

    int32 entries, then for each: int32 length, the weight's name in GGUF, int32 calls, int32 values, fp32 values

The values are the mean squares of what reached each input, times the calls; newer files have the last chunk and the name of the
text behind. Names become those of a Hugging Face model by the rows of `models.gguf_names`. Fused experts are left out: an entry of
theirs is for all of them.
"""

from __future__ import annotations

import re
import struct
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lowbit.errors import CheckpointError, one_line
from lowbit.models.gguf_names import FAMILIES

Importance = dict[str, NDArray[np.float32]]
_LAYER = re.compile(r"blk\.(\d+)\.(.+)\.weight")
_MOST_ENTRIES = 1 << 20


def read_importance(path: str | Path, model_type: str) -> Importance:
    """The importance of the inputs [in] of each linear of a model, by its path."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise CheckpointError(f"imatrix={path}: there is no such file")
    data = file.read_bytes()
    if data[:4] == b"GGUF":
        raise CheckpointError(
            f"{file} is an importance matrix in GGUF's form: write it with llama-imatrix --output-format dat"
        )
    try:
        entries = _entries(data)
    except (struct.error, ValueError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file} is no importance matrix, or is damaged: {one_line(str(error))}") from None
    names = _names(model_type, entries)
    found = {names[name]: values for name, values in entries.items() if name in names}
    if not found:
        raise CheckpointError(f"{file} names no weight of a {model_type} model: it was measured on another one")
    return found


def _entries(data: bytes) -> Importance:
    """The values of each entry, by its name."""
    (count,) = struct.unpack_from("<i", data)
    if not 1 <= count <= _MOST_ENTRIES:
        raise ValueError(f"it says that it has {count} entries")
    at, found = 4, {}
    for _ in range(count):
        (length,) = struct.unpack_from("<i", data, at)
        name = struct.unpack_from(f"<{length}s", data, at + 4)[0].decode()
        at += 4 + length
        calls, values = struct.unpack_from("<ii", data, at)
        read = np.frombuffer(data, "<f4", values, at + 8)
        at += 8 + 4 * values
        if values < 1 or not np.isfinite(read).all() or (read < 0).any():
            raise ValueError(f"the entry {name} holds what is no mean square")
        found[name] = (read / max(calls, 1)).astype(np.float32)
    return found


def _names(model_type: str, entries: Importance) -> dict[str, str]:
    """The path in the model of each entry."""
    family = next((family for family in FAMILIES if family.model_type == model_type), None)
    if family is None:
        known = ", ".join(sorted({family.model_type for family in FAMILIES}))
        raise CheckpointError(f"an importance matrix cannot be read for a {model_type} model; known are {known}")
    stems = {row.gguf: row.hf for row in family.tensors}
    found = {}
    for name in entries:
        layer = _LAYER.fullmatch(name)
        stem = stems.get(layer[2] if layer else name.removesuffix(".weight"))
        if stem is not None and "{" not in stem:
            found[name] = f"{family.layer.format(i=layer[1])}.{stem}" if layer else stem
    return found
