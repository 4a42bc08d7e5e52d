"""The committed texts, and windows of tokens cut from them.

`sqlite_train` calibrates and trains, `sqlite_valid` reports in the domain, `moby_dick` reports out of it. They lie in the
package, which knows them by name. `assets/make_texts.py` made the files and says by which rules.
"""

import lzma
from collections.abc import Sequence
from pathlib import Path

DATA = Path(__file__).parents[2] / "src" / "lowbit" / "texts"
SUFFIX = ".txt.xz"


def text(name: str) -> str:
    """One of the committed texts, by name: `sqlite_train`, `sqlite_valid` or `moby_dick`."""
    files = {file.name.removesuffix(SUFFIX): file for file in DATA.glob(f"*{SUFFIX}")}
    if name not in files:
        raise ValueError(f"no text is called {name!r}; there are {', '.join(sorted(files))}")
    return lzma.decompress(files[name].read_bytes()).decode()


def chunks(token_ids: Sequence[int], length: int, count: int) -> list[list[int]]:
    """`count` windows of `length` tokens that do not overlap, spread evenly over the whole text.

    Spread, because a manual or a novel changes its subject: the first windows alone would measure its opening.
    """
    stride = len(token_ids) // count
    if stride < length:
        raise ValueError(f"{len(token_ids)} tokens hold {len(token_ids) // length} windows of {length}, not {count}")
    return [list(token_ids[start : start + length]) for start in range(0, stride * count, stride)]
