"""The NEON rows: the core cross-compiled for 64-bit Arm, and its native checks run under an emulator.

The emulated processor has products of matrices of bytes (i8mm); an older one, which has only dot products, ends a program that
executes what it lacks, and one without these too has the portable row.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "native" / "neon.sh"
MISSING = 77


def emulator() -> str:
    found = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
    assert found is not None
    return found


def rows(printed: str) -> set[tuple[str, str]]:
    """Groups of checks and the instruction sets that passed them."""
    words = [line.split() for line in printed.splitlines()]
    return {(line[0], line[1]) for line in words if len(line) == 4 and line[3] == "s"}


@pytest.mark.slow
def test_native_checks_hold_on_neon(tmp_path: Path) -> None:
    # cmake lies beside the interpreter where it was installed by pip.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        ["sh", str(SCRIPT), str(tmp_path), "weights", "products", "selection", "engine"],
        capture_output=True,
        text=True,
        env=os.environ | {"PATH": path},
        check=False,
    )
    if done.returncode == MISSING:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert {(group, name) for group in ("weights", "products", "engine") for name in ("neon", "neon_i8mm")} <= rows(
        done.stdout
    )
    for processor, names in (("cortex-a76", {"portable", "neon"}), ("cortex-a72", {"portable"})):
        command = [emulator(), "-cpu", processor, "-L", "/usr/aarch64-linux-gnu", str(tmp_path / "core_check"), "tight"]
        older = subprocess.run(command, capture_output=True, text=True, check=False)
        assert older.returncode == 0, older.stdout + older.stderr
        assert {name for _, name in rows(older.stdout)} - {"amx_emulated"} == names
