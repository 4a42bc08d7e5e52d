"""A process that goes on as another program."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping


def become(command: list[str], environment: Mapping[str, str]) -> int:
    """Go on as another program; returns on Windows alone, where a replaced process ends for the one that waits for it."""
    sys.stdout.flush()
    if os.name == "nt":
        import subprocess

        return subprocess.call(command, env=environment)
    os.execve(command[0], command, environment)
