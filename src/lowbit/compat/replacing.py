"""Names of other libraries, replaced and put back. The runner and `install` change others' modules in this one way."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

_ABSENT = object()


@dataclass(frozen=True)
class Replacement:
    """`owner.name` shall be `value`; the owner is a module, or a class, or anything else that takes attributes."""

    owner: Any
    name: str
    value: Any


class Replacements:
    """What was replaced so far, and what was there."""

    def __init__(self) -> None:
        self._before: list[Replacement] = []
        self._afterwards: list[Callable[[], None]] = []

    def make(self, wanted: Iterable[Replacement]) -> None:
        for one in wanted:
            # A name that the owner inherits is not the owner's: it is put back by taking ours away.
            before = vars(one.owner).get(one.name, _ABSENT)
            self._before.append(Replacement(one.owner, one.name, before))
            setattr(one.owner, one.name, one.value)

    def when_undone(self, action: Callable[[], None]) -> None:
        """Call it once everything is what it was."""
        self._afterwards.append(action)

    def undo(self) -> None:
        while self._before:
            one = self._before.pop()
            if one.value is _ABSENT:
                delattr(one.owner, one.name)
            else:
                setattr(one.owner, one.name, one.value)
        while self._afterwards:
            self._afterwards.pop()()
