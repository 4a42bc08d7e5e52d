"""The committed texts, and windows of tokens cut from them.

`sqlite_train` calibrates and trains, `sqlite_valid` reports in the domain, `moby_dick` reports out of it.
`assets/make_texts.py` made the files and says by which rules.
"""

import lzma
from collections.abc import Sequence
from pathlib import Path

DATA = Path(__file__).parent / "data"
SUFFIX = ".txt.xz"


def text(name: str) -> str:
    """One of the committed texts, by name: `sqlite_train`, `sqlite_valid` or `moby_dick`."""
    path = DATA / f"{name}{SUFFIX}"
    known = sorted(file.name.removesuffix(SUFFIX) for file in DATA.glob(f"*{SUFFIX}"))
    if name not in known:
        raise ValueError(f"no text is called {name!r}; there are {', '.join(known)}")
    return lzma.decompress(path.read_bytes()).decode()


def chunks(token_ids: Sequence[int], length: int, count: int) -> list[list[int]]:
    """`count` windows of `length` tokens that do not overlap, spread evenly over the whole text.

    Spread, because a manual or a novel changes its subject: the first windows alone would measure its opening.
    """
    stride = len(token_ids) // count
    if stride < length:
        raise ValueError(f"{len(token_ids)} tokens hold {len(token_ids) // length} windows of {length}, not {count}")
    return [list(token_ids[start : start + length]) for start in range(0, stride * count, stride)]
