"""What happens to a process in which old scripts run, and how it is taken back.

`install` puts the finder of old names in front of Python's own, lets the table of shims wait for the modules it changes, and
lets child Pythons do the same by a folder on PYTHONPATH. Nothing is imported for it: each part waits for the import it is about.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from lowbit.compat import aliases, shims, xpu
from lowbit.compat.replacing import Replacements
from lowbit.errors import LowbitError

CHILD_FOLDER = str(Path(__file__).parent / "child")
_PATH_VARIABLE = "PYTHONPATH"


class Installed:
    """What `install` changed; `undo` takes it back, and so does the end of a `with` block."""

    def __init__(self) -> None:
        self.replaced = Replacements()
        self.finder: aliases.AliasFinder | None = None
        self.parts: list[shims.Applied | xpu.Redirection] = []
        self.search_path: str | None = None
        self.children = False

    def undo(self) -> None:
        for part in self.parts:
            part.stop_waiting()
        self.parts = []
        self.replaced.undo()
        if self.finder is not None:
            aliases.remove(self.finder)
            self.finder = None
        if self.children:
            _restore_variable(_PATH_VARIABLE, self.search_path)
            self.children = False

    def __enter__(self) -> Installed:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()


def install(*, children: bool = True) -> Installed:
    """Answer the old import names in this process and, with `children`, in the Pythons it starts. A second call changes nothing."""
    done = Installed()
    kind = xpu.chosen_kind()
    if not any(isinstance(finder, aliases.AliasFinder) for finder in sys.meta_path):
        done.finder = aliases.AliasFinder()
        sys.meta_path.insert(0, done.finder)
        done.parts = [shims.Applied(done.replaced)]
        if kind is not None:
            done.parts.append(xpu.Redirection(kind, done.replaced))
        try:
            for part in done.parts:
                part.begin()
        except LowbitError:  # a device that is not there
            done.undo()
            raise
    if children and CHILD_FOLDER not in _search_path():
        done.search_path, done.children = os.environ.get(_PATH_VARIABLE), True
        os.environ[_PATH_VARIABLE] = child_search_path()
    return done


def child_search_path() -> str:
    """PYTHONPATH as a child Python needs it: our folder first, whose `sitecustomize` Python imports when it starts."""
    return os.pathsep.join([CHILD_FOLDER, *(place for place in _search_path() if place != CHILD_FOLDER)])


def _search_path() -> list[str]:
    value = os.environ.get(_PATH_VARIABLE, "")
    return value.split(os.pathsep) if value else []


def _restore_variable(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value
