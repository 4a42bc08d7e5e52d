"""Writing a safetensors file one tensor at a time.

    file = header length u64 | header JSON, padded with spaces to a multiple of 8 | the tensors' bytes in turn

The header needs only names, types and shapes, so it can be written before the first tensor exists. The safetensors
package takes all tensors of a file at once instead, and through numpy it has no bfloat16; here the peak is one
tensor, and bfloat16 is its bits.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lowbit.errors import CheckpointError

ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "I32": 4, "U8": 1}
HEADER_ALIGNMENT = 8


def write_safetensors(
    path: Path, layout: Mapping[str, tuple[str, tuple[int, ...]]], tensors: Iterable[npt.NDArray[Any]]
) -> None:
    """Write `tensors`, in the order of `layout` (name -> safetensors type, shape)."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, (kind, shape) in layout.items():
        end = position + math.prod(shape) * ITEM_BYTES[kind]
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % HEADER_ALIGNMENT)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)))
        file.write(text)
        for name, tensor in zip(layout, tensors, strict=True):
            kind, shape = layout[name]
            if tensor.shape != shape or tensor.dtype.itemsize != ITEM_BYTES[kind]:
                raise CheckpointError(
                    f"'{name}' was announced as {kind} {list(shape)} but is {tensor.dtype} {list(tensor.shape)}"
                )
            file.write(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data)
