"""A seed runs as its user would run it: in a Python of its own, from its own folder, through the runner.

    ran = run_seed("guide2/save_and_load.py", tmp_path, model, "saved")
    ran.lines[-1]

A seed is a script of this folder, written as the readers of a guide write it. It is copied into an empty folder first, so that
what it leaves behind is left there. Then it runs a second time, as `lowbit migrate` rewrites it, by Python alone, and must print
the same.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

SEEDS = Path(__file__).parent
# Packages that stand where a script's own would, and that have no build to install here.
STAND_INS = SEEDS.parent / "stand_ins"
SECONDS = 900
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


def run_seed(seed: str, folder: Path, *arguments: object, xpu: str = "cpu", stand_ins: bool = False) -> Ran:
    """Run a seed with these arguments; `xpu` is what its "xpu" means, the empty text for what torch makes of it."""
    from lowbit.migrate.codemod import migrate  # needs libcst, which running a script does not

    script = folder / Path(seed).name
    if not script.exists():
        shutil.copy(SEEDS / seed, script)
    ran = run_script(script, *arguments, xpu=xpu, stand_ins=stand_ins)
    rewritten = folder / f"migrated_{script.name}"
    rewritten.write_text(migrate(script.read_text(), xpu or None).source)
    again = run_script(rewritten, *arguments, xpu=xpu, stand_ins=stand_ins, runner=False)
    assert lasting(again.lines) == lasting(ran.lines)
    return ran


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
