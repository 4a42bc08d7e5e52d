"""What a row of the table is, and the words it speaks when it is used."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from lowbit.compat.ignored import say_once
from lowbit.compat.replacing import Replacement

Changes = Callable[[ModuleType], Iterable[Replacement]]


@dataclass(frozen=True)
class Shim:
    """`old` as a script writes it, why it needs help today, the module whose import it waits for, and what is replaced there.

    `test` is the test that makes the old call. A quiet row answers a library and not the script: there is nothing to tell.
    """

    old: str
    reason: str
    module: str
    changes: Changes
    test: str


@dataclass(frozen=True)
class Keyword:
    """An argument of old: why it is none today, and what stands for its value now (nothing, for one that is dropped)."""

    old: str
    reason: str
    translate: Callable[[Any], Mapping[str, Any]]


def renamed(old: str, new: str) -> Keyword:
    return Keyword(old, f"is called {new} today", lambda value: {new: value})


def dropped(old: str, reason: str) -> Keyword:
    return Keyword(old, f"has no effect: {reason}", lambda value: {})


def say(old: str, reason: str) -> None:
    """Name a shim, once, at the line of the script that uses it."""
    say_once(f"{old} {reason}")


def translated(
    owner: str, keywords: Mapping[str, Keyword], given: Mapping[str, Any], accepted: Container[str] = ()
) -> dict[str, Any]:
    """The arguments as they are called today. What today's signature accepts stays, and what is given in today's words wins."""
    now = {name: value for name, value in given.items() if name in accepted or name not in keywords}
    for name, value in given.items():
        if name not in now:
            say(f"{owner}({name}=)", keywords[name].reason)
            now = {**keywords[name].translate(value), **now}
    return now
