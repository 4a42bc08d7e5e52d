"""A seed runs as its user would run it: in a Python of its own, from its own folder, through the runner.

    for ran in run_seed("guide2/save_and_load.py", tmp_path, model, "saved"):
        ran.lines[-1], ran.folder / "saved"

A seed is a script of this folder, written as the readers of a guide write it. It is copied into an empty folder first, so that
what it leaves behind is left there. Then it runs a second time, as `lowbit migrate` rewrites it, by Python alone and in a folder of
its own, and must print the same. No old name is left in what was rewritten but those that the test declares.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

SEEDS = Path(__file__).parent
# Packages that stand where a script's own would, and that have no build to install here.
STAND_INS = SEEDS.parent / "stand_ins"
SECONDS = 900
# The old packages, by the names that `lowbit migrate` lists them by.
OLD = {
    "bigdl": "ipex_llm",
    "ipex_llm": "ipex_llm",
    "intel_extension_for_pytorch": "intel_extension_for_pytorch",
    "neural_compressor": "neural_compressor",
    "nncf": "nncf",
    "optimum": "optimum",
}
_TIMES = re.compile(r"runtime|per_second|seconds|latency")


@dataclass(frozen=True)
class Ran:
    """What a script printed, and the folder that it ran in."""

    out: str
    err: str
    folder: Path

    @property
    def lines(self) -> list[str]:
        return self.out.splitlines()


def run_seed(
    seed: str,
    folder: Path,
    *arguments: object,
    xpu: str = "cpu",
    stand_ins: bool = False,
    left: Mapping[str, str] | None = None,
    rewritten: bool = True,
) -> list[Ran]:
    """Run a seed with these arguments, as it is and as it is rewritten; both runs, in this order.

    `xpu` is what its "xpu" means, the empty text for what torch makes of it. `left` declares the old names that have to stay, each
    with words of the reason. Without `rewritten` it runs as it is alone: where another run of the seed shows the rest.
    """
    sources = {"as_it_is": (SEEDS / seed).read_text()}
    if rewritten:
        sources["rewritten"] = rewrite(sources["as_it_is"], xpu, left or {})
    found = []
    for name, source in sources.items():
        script = folder / name / Path(seed).name
        script.parent.mkdir(parents=True, exist_ok=True)
        script.write_text(source)
        runner = name == "as_it_is"
        found.append(run_script(script, *arguments, xpu=xpu, stand_ins=stand_ins, runner=runner))
    assert all(lasting(ran.lines) == lasting(found[0].lines) for ran in found)
    return found


def rewrite(source: str, xpu: str, left: Mapping[str, str]) -> str:
    """The script in lowbit's names. Old names stay in it if they were declared, and for the reason that was declared."""
    from lowbit.migrate.codemod import migrate  # needs libcst, which running a script does not

    found = migrate(source, xpu or None)
    reasons = {note.name: note.reason for note in found.left}
    assert reasons.keys() == left.keys(), reasons
    assert all(words in reasons[name] for name, words in left.items()), reasons
    assert old_packages(found.source) <= {name.partition(".")[0] for name in left}, found.source
    assert left or found.source != source, "nothing was rewritten"
    return found.source


def old_packages(source: str) -> set[str]:
    """The old packages that a script imports, wherever it does."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names.append(node.module or "")
    tops = {name.partition(".")[0] for name in names}
    return {OLD[top] for top in tops & OLD.keys()}


def lasting(lines: list[str]) -> list[str]:
    """The lines that are the same in every run: without times and speeds."""
    return [line for line in lines if not _TIMES.search(line)]


def run_script(script: Path, *arguments: object, xpu: str = "cpu", stand_ins: bool = False, runner: bool = True) -> Ran:
    done = start_script(script, *arguments, xpu=xpu, stand_ins=stand_ins, runner=runner)
    assert done.returncode == 0, f"{script.name}\n{done.stdout[-3000:]}\n{done.stderr[-5000:]}"
    return Ran(done.stdout, done.stderr, script.parent)


def start_script(
    script: Path, *arguments: object, xpu: str = "cpu", stand_ins: bool = False, runner: bool = True
) -> subprocess.CompletedProcess[str]:
    """The same for scripts that shall fail."""
    environment = {**os.environ, "LOWBIT_XPU": xpu}
    if not xpu:
        del environment["LOWBIT_XPU"]
    if stand_ins:
        places = [str(STAND_INS), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment["PYTHONPATH"] = os.pathsep.join(places)
    command = [sys.executable, *(("-m", "lowbit.compat") if runner else ()), script.name, *map(str, arguments)]
    return subprocess.run(
        command, cwd=script.parent, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False
    )
