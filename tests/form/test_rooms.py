"""The house holds: who may import whom, how long things get, and what the public face is."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "lowbit"
FILES = sorted(SOURCE.rglob("*.py"))
# A room imports only from rooms of an earlier row; rooms of one row never import one another.
ROWS = [
    {"errors", "methods"},
    {"formats", "machine", "progress", "report", "contents", "search", "options", "texts"},
    {"bits", "packing", "core", "recipe", "schemes"},
    {"small_blocks", "configs", "allocate"},
    {"kquants", "grid_core", "grid_points"},
    {"grid_search"},
    {"grid"},
    {"kernels", "models"},
    {"layers", "algorithms", "interop"},
    {"swap", "evaluate", "parallel", "finetune", "runtime"},
    {"calibration"},
    {"blockwise"},
    {"quantize", "bridge", "questions"},
    {"checkpoint"},
    {"hook"},
    {"optimize"},
    {"openvino"},
    {"bench", "doctor", "demo", "observed"},
    {"compat"},
    {"migrate"},
    {"cli"},
    {"__init__", "__main__"},
]
ROW_OF = {room: row for row, rooms in enumerate(ROWS) for room in rooms}
# Rooms that the engine and the readers of containers stand on.
WITHOUT_TORCH = [
    "errors",
    "contents",
    "formats",
    "packing",
    "search",
    "schemes",
    "models.spec",
    "models.families",
    "core.calls",
    "allocate",
    "interop.gguf",
    "cli",
]
OPTIONAL = {"gguf", "peft", "accelerate", "compressed_tensors", "triton", "deepspeed", "libcst"}
OPTIONAL |= {"openvino", "openvino_tokenizers", "diffusers"}


def room(path: Path) -> str:
    return path.relative_to(SOURCE).with_suffix("").parts[0]


def room_of(name: str) -> str:
    """The room of an imported module or name, `lowbit.core.calls.run` for one."""
    return name.split(".")[1]


def imports(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_go_upward(path: Path) -> None:
    here = room(path)
    assert here in ROW_OF, f"{here} has no row in the house; give it one here and in docs/design.md"
    for name in imports(path):
        if name.startswith("lowbit."):
            there = room_of(name)
            if there in ROW_OF and there != here:
                assert ROW_OF[there] < ROW_OF[here], f"{path.name} ({here}) imports {name}, which is not above it"


def test_one_optional_library_in_one_room() -> None:
    rooms: dict[str, set[str]] = {}
    for path in FILES:
        for name in imports(path):
            if name.split(".")[0] in OPTIONAL:
                rooms.setdefault(name.split(".")[0], set()).add(str(path.relative_to(SOURCE)))
    assert all(len(places) == 1 for places in rooms.values()), rooms


def test_what_stands_in_for_others_stays_with_the_tests() -> None:
    """tests/stand_ins answers names that the package itself knows nothing of."""
    names = {path.name for path in (Path(__file__).parents[1] / "stand_ins").iterdir() if path.is_dir()}
    assert "torchvision" in names
    assert not [path for path in FILES for name in imports(path) if name.partition(".")[0] in names]


def functions(path: Path) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    tree = ast.parse(path.read_text())
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_sizes(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 400
    long = {
        f.name: f.end_lineno - f.lineno + 1 for f in functions(path) if f.end_lineno and f.end_lineno - f.lineno >= 60
    }
    assert not long


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_every_file_says_what_it_is(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text()))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_no_broad_except(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None and getattr(node.type, "id", "") not in ("Exception", "BaseException")


def test_public_names() -> None:
    import lowbit

    assert lowbit.__all__ == [*sorted(n for n in lowbit.__all__ if n != "__version__"), "__version__"]
    for name in lowbit.__all__:
        assert getattr(lowbit, name) is not None


def test_rooms_without_torch() -> None:
    """The torch-free rooms import in a Python where torch and transformers cannot be imported."""
    present = [m for m in WITHOUT_TORCH if (SOURCE / (m.replace(".", "/") + ".py")).exists() or (SOURCE / m).is_dir()]
    code = (
        "import sys\n"
        "sys.modules['torch'] = sys.modules['transformers'] = None\n"
        "import importlib\n"
        f"for name in {present!r}: importlib.import_module('lowbit.' + name)\n"
        "print('imported', len(sys.modules) > 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("imported")


def test_import_is_light() -> None:
    code = "import sys, lowbit; print(sorted({'torch', 'transformers', 'rich', 'numpy'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_version_is_in_the_changelog() -> None:
    import lowbit

    assert f"## {lowbit.__version__}" in (ROOT / "CHANGELOG.md").read_text()
