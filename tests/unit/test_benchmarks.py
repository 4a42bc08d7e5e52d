"""What a page of results says of itself: the tree that ran, and how far its figures carry."""

import argparse
import importlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def load() -> Iterator[object]:
    """Imports a script of benchmarks/, which lie outside of every package."""
    before = list(sys.path)
    sys.path.insert(0, str(BENCHMARKS))
    yield importlib.import_module
    sys.path[:] = before


def git(folder: Path, *arguments: str) -> None:
    own = ["-c", "user.name=test", "-c", "user.email=test@example.org", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", "-C", str(folder), *own, *arguments], check=True, capture_output=True)


def test_a_tree_that_differs_from_its_commit_is_marked(tmp_path: Path, load: object) -> None:
    common: ModuleType = load("common")  # type: ignore[operator]
    for name in ("src/lowbit/recipe.py", "benchmarks/one.py", "benchmarks/results/one.md", "docs/page.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("first\n")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "first")
    clean = common.commit_of_tree(tmp_path)
    assert re.fullmatch("[0-9a-f]{10}", clean)
    for harmless in ("benchmarks/results/one.md", "benchmarks/results/new.json", "docs/page.md"):
        (tmp_path / harmless).write_text("second\n")
        assert common.commit_of_tree(tmp_path) == clean, harmless
    for name in ("src/lowbit/recipe.py", "src/lowbit/new.py", "benchmarks/one.py", "benchmarks/peers/new.py"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        before = path.read_text() if path.exists() else None
        path.write_text("second\n")
        assert common.commit_of_tree(tmp_path) == f"{clean}, with uncommitted changes", name
        path.write_text(before) if before is not None else path.unlink()
    (tmp_path / "src/lowbit/recipe.py").write_text("second\n")
    assert common.changed_since(clean, ["src"], tmp_path) == ["src/lowbit/recipe.py"]
    assert common.changed_since("0000000000", ["src"], tmp_path) == []


def test_a_small_run_leaves_the_kept_table_alone(load: object) -> None:
    common: ModuleType = load("common")  # type: ignore[operator]
    default_format: ModuleType = load("default_format")  # type: ignore[operator]
    assert default_format.home_of(windows=6, kept=False) == common.SCRATCH
    assert (
        default_format.home_of(windows=48, kept=False) == default_format.home_of(windows=6, kept=True) == common.RESULTS
    )
    assert (
        common.SCRATCH not in (common.RESULTS, *common.RESULTS.parents) and common.RESULTS not in common.SCRATCH.parents
    )


def test_the_page_of_the_default_says_how_far_it_carries(load: object) -> None:
    default_format: ModuleType = load("default_format")  # type: ignore[operator]
    data = json.loads((BENCHMARKS / "results" / "default_format.json").read_text())
    made = default_format.report(data)
    page = (BENCHMARKS / "results" / "default_format.md").read_text()
    for said in (
        "Not held out",
        "other drafts of the model** the default has KL 0.352",
        "Q8_0",
        "What was varied",
        "compressed-tensors",
    ):
        assert said in made and said in page, said
    assert "int4_g32_dq, v int6_g32_dq, tied int5_asym_g32_dq: KL 0.249 at 4.574 bits" in page
    # No figure of the page was written by hand: the script gives them all.
    for line in page.splitlines():
        if line.startswith("| int"):
            assert line in made


def test_rows_measured_again_stand_beside_the_first(load: object) -> None:
    default_format: ModuleType = load("default_format")  # type: ignore[operator]
    measured_again: ModuleType = load("measured_again")  # type: ignore[operator]
    data = json.loads((BENCHMARKS / "results" / "default_format.json").read_text())
    data.pop(measured_again.AGAIN, None)
    assert measured_again.section(data) == []
    machine = data["machine"] | {"commit": "later"}
    for shift in (0.5, 0.001):  # the second run takes the place of the first
        rows = measured_again.begin_run(data, machine, windows=2)
        row = json.loads(json.dumps(data["rows"][0]))
        for numbers in row["texts"].values():
            numbers["windows_kl"] = [kl + shift for kl in numbers["windows_kl"][:2]]
        rows.append(row)
    page = default_format.report(data)
    found = page.partition("## Measured again")[2].partition("\n## ")[0]
    (line,) = (line for line in found.splitlines() if line.startswith("| int"))
    assert line.startswith(f"| {row['name']} | {row['bits']:.3f} | {row['bits']:.3f} |")
    assert line.endswith("| +0.001000 | 0.001000 |") and "the first 2 of the 48 windows of each text" in page
    assert f"1 of the {len(data['rows'])} rows were measured again at later; they differ by 0.001000 at most" in page


def test_an_unknown_row_is_told_with_the_nearest(load: object) -> None:
    default_format: ModuleType = load("default_format")  # type: ignore[operator]
    with pytest.raises(SystemExit, match="did you mean int4_g64, tied int5_g32"):
        default_format.measure_again(argparse.Namespace(only=["int4_g64, tied int5_g3"]))
