"""What of an HTML manual is prose: its paragraphs, without tables, code and navigation.

A paragraph is the text of a p, li, dd or blockquote. It reads like prose when it has at least 20 words, more than 85 %
letters and spaces, and an end mark at its end.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from html.parser import HTMLParser

_SKIPPED = frozenset({"script", "style", "pre", "table", "nav", "head"})
_PARAGRAPHS = frozenset({"p", "li", "dd", "blockquote"})
_BREAKS = _PARAGRAPHS | {"div", "dt", "ul", "ol", "dl", "h1", "h2", "h3", "h4", "h5", "h6", "hr"}
_FEWEST_WORDS = 20
_LETTERS_SHARE = 0.85


def prose_of(pages: Iterable[str]) -> list[str]:
    """The paragraphs of HTML pages that read like prose, each once, in their order."""
    found: dict[str, None] = {}  # an ordered set: exact duplicates go
    for page in pages:
        parser = _ParagraphParser()
        parser.feed(page)
        parser.close()
        found.update(dict.fromkeys(filter(reads_like_prose, parser.paragraphs)))
    return list(found)


def reads_like_prose(paragraph: str) -> bool:
    letters = sum(character.isalpha() or character == " " for character in paragraph)
    return (
        len(paragraph.split()) >= _FEWEST_WORDS
        and letters > _LETTERS_SHARE * len(paragraph)
        and re.search(r"[.!?:;][)\"'”]*$", paragraph) is not None
    )


class _ParagraphParser(HTMLParser):
    """Collects paragraphs. `p` and `li` are rarely closed in some manuals: any block tag ends the one before it."""

    def __init__(self) -> None:
        super().__init__()
        self.paragraphs: list[str] = []
        self._pieces: list[str] = []
        self._skipping = 0
        self._inside = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._skipping += tag in _SKIPPED
        if tag in _BREAKS | _SKIPPED:
            self._end(inside=tag in _PARAGRAPHS)

    def handle_endtag(self, tag: str) -> None:
        self._skipping = max(0, self._skipping - (tag in _SKIPPED))
        if tag in _BREAKS:
            self._end(inside=False)

    def handle_data(self, data: str) -> None:
        if self._inside and not self._skipping:
            self._pieces.append(data)

    def close(self) -> None:
        super().close()
        self._end(inside=False)

    def _end(self, inside: bool) -> None:
        self.paragraphs.append(" ".join("".join(self._pieces).split()))
        self._pieces.clear()
        self._inside = inside
