"""Every code block of the README and the docs runs, and every example too.

The blocks of one page run in order in one empty folder: python blocks in a process each, shell blocks line by line, C++ blocks
compiled and linked with the core. A python block that begins with the name of a file (`# old.py`) is that file, for the lines
of the shell to run.
Lines that set the project up (`make`, `pip`, `git`, `cd`) are what brought this test here and are checked for existing
targets only.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lowbit.core.library import library_path
from lowbit.formats import ALIASES, FORMATS, format_from_name
from lowbit.options import AUTOROUND_RECIPES, ROUNDER_OPTIONS, SCALER_OPTIONS
from lowbit.texts import TEXT_NAMES
from lowbit.texts.packages import PACKAGED

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NOTES = sorted((ROOT / "docs" / "notes").glob("*.md"))
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"# (\w+\.py)\n")
SETTING_UP = ("make ", "pip ", "git ", "cd ")
SECONDS = 900


def run(command: list[str], folder: Path) -> None:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    result = subprocess.run(
        command,
        cwd=folder,
        env=os.environ | {"PATH": path},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        input="",
        check=False,
    )
    assert result.returncode == 0, f"{command}\n{result.stdout[-2000:]}\n{result.stderr[-3000:]}"


def run_shell(block: str, folder: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for line in block.splitlines():
        command = line.partition("  #")[0].strip()
        if command.startswith("make "):
            assert set(command.split()[1:]) <= targets, command
        elif command and not command.startswith(("#", *SETTING_UP)):
            run(["bash", "-c", command], folder)


def run_cpp(block: str, folder: Path) -> None:
    (folder / "main.cpp").write_text(block)
    core = library_path()
    assert core is not None
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", f"-I{ROOT / 'src/lowbit/csrc'}"]
    run(["g++", *flags, "main.cpp", str(core), f"-Wl,-rpath,{core.parent}", "-o", "main"], folder)
    run(["./main"], folder)


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_code_blocks_run(page: Path, tmp_path: Path) -> None:
    for language, block in BLOCK.findall(page.read_text()):
        file = FILE.match(block)
        if language == "python" and file:
            (tmp_path / file[1]).write_text(block)
        elif language == "python":
            run([sys.executable, "-c", block], tmp_path)
        elif language in ("sh", "shell", "bash", "console"):
            run_shell(block, tmp_path)
        elif language == "cpp":
            run_cpp(block, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda p: p.stem)
def test_examples_run(example: Path, tmp_path: Path) -> None:
    assert len(example.read_text().splitlines()) <= 40
    run([sys.executable, str(example)], tmp_path)


def test_links_lead_somewhere() -> None:
    for page in PAGES + NOTES:
        prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
        for target, place in re.findall(r"\]\(([^)#]*)(#[^)]+)?\)", prose):
            if not target.startswith(("http:", "https:")):
                assert (page.parent / target).exists(), f"{page.name}: {target}"
            if place and not target:
                assert place in places(prose), f"{page.name}: {place}"


def places(prose: str) -> set[str]:
    """The headings of a page as links name them."""
    titles = re.findall(r"^#+ (.+)$", prose, re.MULTILINE)
    return {"#" + re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_the_table_of_formats_is_the_code() -> None:
    page = (ROOT / "docs" / "formats.md").read_text()
    for name, format in FORMATS.items():
        assert f"| `{name}` | {format.kind} | {format.bits_per_weight:g} |" in page
    for alias in ALIASES:
        assert f"| `{alias}` | `{format_from_name(alias).name}` |" in page
    assert len(re.findall(r"^\| `", page, re.MULTILINE)) == len(FORMATS) + len(ALIASES)


def test_the_tables_of_algorithms_are_the_code() -> None:
    page = (ROOT / "docs" / "quantization.md").read_text()
    for name, options in (ROUNDER_OPTIONS | SCALER_OPTIONS).items():
        said = ", ".join(f"`{field.name}={field.default}`" for field in dataclasses.fields(options)) or "none"
        assert f"| `{name}` | {said} |" in page
        assert page.count(f"| `{name}` |") == 2
    for name in AUTOROUND_RECIPES:
        assert f"`recipe={name}`" in page


def test_the_table_of_texts_is_the_code() -> None:
    page = (ROOT / "docs" / "quantization.md").read_text()
    table = page.partition("| name | text | comes with |")[2].partition("\n\n")[0]
    named = [name for row in table.splitlines()[2:] for name in re.findall("`(\\w+)`", row.split("|")[1])]
    assert named == list(TEXT_NAMES)
    for name, text in PACKAGED.items():
        assert f"`{text.install.partition(' (')[0]}`" in table, name


def test_the_quality_that_the_page_gives_is_measured() -> None:
    rows = json.loads((ROOT / "benchmarks" / "results" / "quality.json").read_text())["rows"]
    kl = {row["name"]: [text["kl"] for text in row["texts"].values()] for row in rows if "texts" in row}
    page = (ROOT / "docs" / "quantization.md").read_text()
    lines = page.partition("## Which to take")[2].partition("\n- ")[0].splitlines()
    header, _, *table = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")
    ]
    assert len(table) == 7
    for algorithm, *cells in table:
        for scheme, cell in zip(header[1:], cells, strict=True):
            found = kl.get(f"lowbit {algorithm}, {scheme}")
            assert cell == ("" if found is None else f"{sum(found) / len(found):.3f}"), (algorithm, scheme)


def test_every_device_says_how_far_it_has_run() -> None:
    """run on such hardware, emulated, or compiled alone; what has not run on a device says that."""
    table = (ROOT / "README.md").read_text(encoding="utf-8").partition("## What runs where")[2].partition("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ")][1:]
    devices = " ".join(row[0] for row in rows)
    assert all(name in devices for name in ("AMX", "VNNI", "AVX2", "NEON", "any other"))
    for device, state in rows:
        assert re.search(r"\*(run|emulated|compiled)\*|has not run on one", state), device
