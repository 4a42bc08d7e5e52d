"""The NEON row: the core cross-compiled for 64-bit Arm, and its native checks run under an emulator."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "native" / "neon.sh"
MISSING = 77


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
    for group in ("weights", "products", "engine"):
        assert any(line.split()[:2] == [group, "neon"] for line in done.stdout.splitlines()), done.stdout
