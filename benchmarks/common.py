"""What every benchmark shares: a row that says which machine ran it, and results written for people and for programs.

A figure without its machine, commit and command cannot be repeated, so `write_results` puts them above every table:
`results/NAME.md` to read, `results/NAME.json` with the same numbers and more digits.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE / "results"
# The flags of /proc/cpuinfo that decide which kernels run, the widest first.
INSTRUCTION_SETS = ("amx_int8", "avx512_vnni", "avx_vnni", "avx512f", "avx2", "asimddp", "asimd")
# What a figure can depend on: everything that is built, run or read.
DECIDES = ("src", "assets", "benchmarks", "pyproject.toml", "requirements", ":(exclude)benchmarks/results")
# Where a run goes that is too small to stand for the table that is kept.
SCRATCH = HERE.parent / "build" / "benchmarks"
# Options with a value that no other machine needs.
LOCAL_OPTIONS = ("--results", "--reference", "--commit", "--remark")

for folder in (HERE.parent / "assets", HERE.parent / "src"):
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


def machine(device: str = "cpu", commit: str | None = None) -> dict[str, str]:
    """The machine row: what ran, on what, from which commit."""
    row = {
        "processor": processor(),
        "instruction set": instruction_set(),
        "memory": f"{memory_gigabytes():.0f} GB",
        "commit": commit or commit_of_tree(),
        "command": command(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "python": platform.python_version(),
    }
    if "torch" in sys.modules:
        import torch

        row["torch"] = f"{torch.__version__}, {torch.get_num_threads()} threads"
        if device.startswith("cuda"):
            row["device"] = torch.cuda.get_device_name(device)
    return row


def command() -> str:
    """The command line, without the options that only say where things lie on this machine."""
    words, left = ["python", str(Path("benchmarks") / Path(sys.argv[0]).name)], iter(sys.argv[1:])
    for word in left:
        if word in LOCAL_OPTIONS:
            next(left, None)
        else:
            words.append(shlex.quote(word))
    return " ".join(words)


def processor() -> str:
    for line in cpuinfo():
        if line.startswith(("model name", "Model")):
            return f"{line.partition(':')[2].strip()}, {cores()} cores"
    return f"{platform.processor() or platform.machine()}, {cores()} cores"


def instruction_set() -> str:
    flags: set[str] = set()
    for line in cpuinfo():
        if line.startswith(("flags", "Features")):
            flags = set(line.partition(":")[2].split())
            break
    return ", ".join(name for name in INSTRUCTION_SETS if name in flags) or platform.machine()


def cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def cores() -> int:
    return sum(line.startswith("processor") for line in cpuinfo())


def memory_gigabytes() -> float:
    path = Path("/proc/meminfo")
    if not path.exists():
        return 0.0
    return int(path.read_text().split()[1]) / 1e6


def commit_of_tree(root: Path = HERE.parent) -> str:
    """The commit, and whether anything that a figure could depend on differs from it, files that git does not know included."""
    found = git("rev-parse", "--short=10", "HEAD", root=root)
    if not found:
        return "unknown"
    changed = git("status", "--porcelain", "--untracked-files=all", "--", *DECIDES, root=root)
    return found + (", with uncommitted changes" if changed else "")


def changed_since(commit: str, paths: Sequence[str], root: Path = HERE.parent) -> list[str]:
    """The files below some paths that differ from a commit; none where git does not know it."""
    return git("diff", "--name-only", commit, "--", *paths, root=root).splitlines()


def bare_commit(row: dict[str, str]) -> str:
    """The commit of a machine row without the remark about changes."""
    return row["commit"].split()[0].rstrip("+,")


def code_names(paths: Iterable[str]) -> str:
    return ", ".join(f"`{path}`" for path in paths)


def git(*arguments: str, root: Path = HERE) -> str:
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return done.stdout.strip()


def parser(description: str) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark has."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--results", type=Path, default=RESULTS, help="where the results are written")
    made.add_argument("--commit", help="the commit to name, where the tree is not a clone")
    return made


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A markdown table; columns after the first are right-aligned."""
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def write_results(folder: Path, name: str, text: str, data: dict[str, Any]) -> None:
    """`name`.md from a text with the machine above it, and `name`.json; `data` holds the row `machine`."""
    folder.mkdir(parents=True, exist_ok=True)
    title, _, body = text.partition("\n")
    rows = [(key, value) for key, value in data["machine"].items()]
    (folder / f"{name}.md").write_text(f"{title}\n\n{table(('what', 'value'), rows)}\n{body.rstrip()}\n")
    (folder / f"{name}.json").write_text(json.dumps(rounded(data)) + "\n")
    print(f"wrote {folder / name}.md and .json")


def rounded(value: Any, digits: int = 6) -> Any:
    """Plain values with their floats cut to the digits that mean something."""
    if isinstance(value, float):
        return round(value, digits)
    if isinstance(value, dict):
        return {key: rounded(item, digits) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item, digits) for item in value]
    return value
