"""The table of old names and its page: what they say is so."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import lowbit.compat
from lowbit.compat.aliases import face_of
from lowbit.compat.names import IGNORED, REFUSED, STATUSES, WORKS, Name, collect, page
from lowbit.errors import LowbitError

ROOT = Path(__file__).parents[2]
ROWS = [row for rows in collect().values() for row in rows]
DOTTED = re.compile(r"^([A-Za-z_][\w.]*?)(?:\((\w+)=\))?$")


@pytest.fixture(autouse=True)
def old_world() -> Iterator[None]:
    with lowbit.compat.install(children=False):
        yield


def resolve(dotted: str) -> Any:
    """The object of a dotted name: the longest module, and the attributes behind it."""
    parts = dotted.split(".")
    value = importlib.import_module(parts[0])
    for index, part in enumerate(parts[1:], 2):
        try:
            # A field whose default is made anew each time is no attribute of its class.
            value = part if part in getattr(value, "__dataclass_fields__", ()) else getattr(value, part)
        except AttributeError:
            value = importlib.import_module(".".join(parts[:index]))
    return value


@cache
def functions_in(file: str) -> set[str]:
    tree = ast.parse((ROOT / file).read_text())
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.old)
def test_a_row_is_true(row: Name) -> None:
    assert row.status in STATUSES
    assert row.remark or row.ours or row.status == WORKS, (
        "what is ignored or refused has its reason in the remark, or a name of ours"
    )
    file, _, name = row.test.partition("::")
    assert name in functions_in(file), f"{row.test} is no test"
    check_ours(row.ours)
    known = DOTTED.match(row.old)
    if known is None or face_of(known[1]) is None:
        return  # a variable, a script, or a name of torch
    if row.status == REFUSED and known[2] is None:
        check_refused(known[1])
        return
    value = resolve(known[1])
    if known[2]:
        parameters = inspect.signature(value).parameters
        open_to_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        assert known[2] in parameters or open_to_all, f"{known[1]} takes no {known[2]}"


def check_ours(ours: str) -> None:
    if ours.startswith("lowbit "):
        from lowbit.cli import COMMANDS

        assert ours.split()[1] in COMMANDS
    elif ours:
        assert resolve(ours) is not None


def check_refused(dotted: str) -> None:
    """Refused is what is not there, with a sentence of ours, or a function that raises when it is called."""
    try:
        value = resolve(dotted)
    except LowbitError as refusal:
        assert str(refusal).startswith("lowbit has no")
    else:
        assert callable(value) or inspect.ismodule(value)


def test_no_name_twice() -> None:
    seen = [row.old for row in ROWS]
    assert len(seen) == len(set(seen)), sorted({name for name in seen if seen.count(name) > 1})


def test_each_public_name_of_a_face_has_a_row() -> None:
    """Under the name of its module, or under another name of the same thing."""
    names = {DOTTED.sub(r"\1", row.old) for row in ROWS}
    things = {id(resolve(row.old)) for row in ROWS if face_of(row.old) and row.status == WORKS and "(" not in row.old}
    faces = [module for name, module in sys.modules.items() if name.startswith("lowbit.compat.faces.")]
    missing = []
    for module in faces:
        place = module.__name__.removeprefix("lowbit.compat.faces.")
        for name in getattr(module, "__all__", ()):
            value = getattr(module, name)
            if f"{place}.{name}" not in names and id(value) not in things and not inspect.ismodule(value):
                missing.append(f"{place}.{name}")
    assert not missing


def test_the_page_is_made_from_the_rows() -> None:
    assert (ROOT / "docs" / "migration.md").read_text() == page() + "\n", (
        "python -m lowbit.compat.names > docs/migration.md"
    )


def test_the_command_prints_the_page() -> None:
    command = [sys.executable, "-m", "lowbit.compat.names"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == page() + "\n"


def test_what_is_ignored_gives_its_reason() -> None:
    assert all(row.remark for row in ROWS if row.status == IGNORED)
