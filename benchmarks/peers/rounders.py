"""Workers that round models, as the benchmark of quality sees them: a process for each project, asked row by row."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from peers.entries import WORKERS
from peers.runners import PeerError, end

# The environment that prepare.py makes for a worker; ours runs in the benchmark's own.
SCRIPTS = {
    "lowbit": "round_lowbit.py",
    "autoround": "round_autoround.py",
    "llmcompressor": "round_llmcompressor.py",
    "hqq": "round_hqq.py",
}
_TOLD = 400


@dataclass
class Rounder:
    """One worker: started when it is first asked, and again after a row that ended it."""

    name: str
    python: Path
    arguments: tuple[str, ...]
    log: Path
    folder: Path  # where it runs: some projects leave files behind
    process: subprocess.Popen[str] | None = None

    def ask(self, settings: dict[str, Any], out: Path) -> dict[str, Any]:
        """Facts of a row, whose weights are in the file `out` then."""
        process = self.running()
        stdin: IO[str] | None = process.stdin
        assert stdin is not None and process.stdout is not None
        stdin.write(json.dumps({"settings": settings, "out": str(out)}) + "\n")
        stdin.flush()
        line = process.stdout.readline()
        if not line:
            code = process.wait()
            self.process = None
            raise PeerError(f"{self.name} ended with {code}: {self.log.read_text(errors='replace')[-_TOLD:]}")
        found: dict[str, Any] = json.loads(line)
        return found

    def running(self) -> subprocess.Popen[str]:
        if self.process is None:
            command = [str(self.python), str(WORKERS / SCRIPTS[self.name]), *self.arguments]
            pipe = subprocess.PIPE
            with self.log.open("w") as log:
                self.process = subprocess.Popen(
                    command, stdin=pipe, stdout=pipe, stderr=log, text=True, cwd=self.folder
                )
        return self.process

    def close(self) -> None:
        if self.process is not None:
            end(self.process)
            self.process = None
