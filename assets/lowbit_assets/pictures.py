"""The committed pictures: emoji of 32 by 32 with their groups, for networks that see.

`assets/make_pictures.py` made the file and says by which rules.
"""

import io
import lzma
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

FILE = Path(__file__).parent / "data" / "emoji.npz.xz"


class Pictures(NamedTuple):
    """`pixels` [n, 32, 32, 3] bytes, `labels` [n] places in `names`."""

    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64]
    names: list[str]


def pictures(valid: bool) -> Pictures:
    """The pictures to train on, or those to validate with."""
    with np.load(io.BytesIO(lzma.decompress(FILE.read_bytes())), allow_pickle=False) as arrays:
        chosen = arrays["valid"] == valid
        labels = arrays["labels"][chosen].astype(np.int64)
        return Pictures(arrays["pictures"][chosen], labels, [str(name) for name in arrays["names"]])
