"""The table of old names and its page: what they say is so."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import runpy
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
# Stands among the words of a test that asserts something.
ASSERTED = "assert "
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
def tree_of(file: str) -> ast.Module:
    return ast.parse((ROOT / file).read_text())


def words_in(*nodes: ast.AST) -> set[str]:
    """Names, and the words of texts, that a piece of code is made of; what it says about itself is left out."""
    found: set[str] = set()
    for node in (inner for outer in nodes for inner in ast.walk(outer)):
        if isinstance(node, ast.Name | ast.alias | ast.Attribute | ast.keyword | ast.arg):
            name = next(getattr(node, field) for field in ("id", "name", "attr", "arg") if hasattr(node, field))
            found |= set((name or "").split("."))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found |= set(re.findall(r"[\w-]+", node.value)) | set(re.findall(r"\w+", node.value))
    return found


@cache
def words_of(test: str) -> set[str]:
    """The words of a test, of the tables of its file or of another that it names, and of the scripts that it runs."""
    file, _, name = test.partition("::")
    tree = tree_of(file)
    tests = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == name]
    if not tests:
        return set()
    function = tests[0]
    if ast.get_docstring(function) is not None:
        function = ast.FunctionDef(**{**vars(function), "body": function.body[1:] or [ast.Pass()]})
    words = words_in(function)
    words |= {ASSERTED} if any(isinstance(node, ast.Assert) for node in ast.walk(function)) else set()
    words |= words_in(*tables(tree, words))
    for node in tree.body:
        other = ROOT / "tests" / (node.module or "").replace(".", "/") if isinstance(node, ast.ImportFrom) else ROOT
        if isinstance(node, ast.ImportFrom) and other.with_suffix(".py").is_file():
            asked = words & {alias.name for alias in node.names}
            home = tree_of(str(other.with_suffix(".py").relative_to(ROOT)))
            first = tables(home, asked)
            words |= words_in(*first, *tables(home, words_in(*first)))
    for script in (value.value for value in ast.walk(function) if isinstance(value, ast.Constant)):
        if isinstance(script, str) and script.endswith(".py") and (ROOT / "tests" / "seeds" / script).is_file():
            words |= words_in(tree_of(f"tests/seeds/{script}"))
    return words


def tables(tree: ast.Module, names: set[str]) -> list[ast.AST]:
    """What is assigned to these names at the top of a file."""
    found: list[ast.AST] = []
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(target, ast.Name) and target.id in names for target in targets):
            found.append(node)
    return found


# What a test does about a name that works, that is ignored aloud, that is refused.
SHOWN_BY = {
    WORKS: {ASSERTED, "assert_close"},
    IGNORED: {"warns"},
    REFUSED: {
        "raises",
        "returncode",
        "NotImplementedError",
    },  # in this process, in a child, in one that tells what it met
}


def last_part(old: str) -> str:
    """The word that a test of a row cannot do without: its last option, the parameter in its brackets, or the last name before."""
    option, parameter = re.findall(r"--(\w+)", old), re.findall(r"\((\w+)=", old)
    if option or parameter:
        return (option or parameter)[-1]
    return re.split(r"[^\w.-]", old.removeprefix("with "))[0].rpartition(".")[2]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.old)
def test_a_row_is_true(row: Name) -> None:
    assert row.status in STATUSES
    assert row.remark or row.ours or row.status == WORKS, (
        "what is ignored or refused has its reason in the remark, or a name of ours"
    )
    assert words_of(row.test), f"{row.test} is no test"
    assert last_part(row.old) in words_of(row.test), f"{row.test} never says {last_part(row.old)}"
    assert words_of(row.test) & SHOWN_BY[row.status], f"{row.test} does not show that {row.old} {row.status}"
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


def test_what_a_test_says_is_found() -> None:
    here = "tests/unit/test_compat_names.py::"
    assert "last_part" in words_of(f"{here}test_a_row_is_true") and "ROWS" in words_of(f"{here}test_a_row_is_true")
    assert words_of(f"{here}test_that_is_not_there") == set()
    assert "memory_snapshot" in words_of("tests/unit/test_compat_xpu_names.py::test_each_name_is_called")
    assert "frobnicate" not in words_of("tests/unit/test_compat_xpu_names.py::test_each_name_is_called")
    assert [last_part(old) for old in ("a.b.c", "a.b(c=)", 'with torch.device("xpu"):', "llm-cli -x", "x.py --y --z")] == [
        "c", "c", "device", "llm-cli", "z",
    ]  # fmt: skip


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


@pytest.mark.filterwarnings("ignore:'lowbit.compat.names' found in sys.modules:RuntimeWarning")
def test_the_command_prints_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_module("lowbit.compat.names", run_name="__main__")
    assert capsys.readouterr().out == page() + "\n"


def test_what_is_ignored_gives_its_reason() -> None:
    assert all(row.remark for row in ROWS if row.status == IGNORED)
