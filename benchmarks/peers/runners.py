"""How a peer is asked for a figure, and what else ran on the machine meanwhile.

A `Worker` is a Python process that stays: loaded once, asked once a round. A `Command` is a process for each figure, as
llama-bench is made to be used; it reads its model from the page cache and warms up by itself. Both give a `Reading`: the
figure, the most memory, and how much of a core other processes (and the host, "steal") took while it ran.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol

from peers.tasks import Task

TICKS = os.sysconf("SC_CLK_TCK")
# Positions in the first line of /proc/stat: user, nice, system, irq, softirq, steal.
BUSY = (1, 2, 3, 6, 7, 8)


class PeerError(RuntimeError):
    """A peer did not give a figure; the text says what it printed."""


@dataclass(frozen=True)
class Reading:
    value: float
    others: float
    peak_bytes: int = 0


class Runner(Protocol):
    def read(self, task: Task, seed: int) -> Reading: ...
    def close(self) -> None: ...


def end(process: subprocess.Popen[str]) -> None:
    """A worker that is asked nothing more ends by itself."""
    assert process.stdin is not None and process.stdout is not None
    process.stdin.close()
    process.wait()
    process.stdout.close()


def busy_seconds() -> float:
    """Processor time that anything has used since the machine started, with what the host took away."""
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()
    return sum(int(fields[i]) for i in BUSY) / TICKS


def process_seconds(pid: int) -> float:
    """Processor time of a living process, all its threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def own_seconds() -> float:
    """Processor time of this process and of its children that have ended."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(u.ru_utime + u.ru_stime for u in used)


class Watch:
    """Cores taken by others between its making and `others()`."""

    def __init__(self, ours: Callable[[], float]) -> None:
        self.ours = ours
        self.start, self.busy, self.own = time.perf_counter(), busy_seconds(), ours()

    def others(self) -> float:
        seconds = max(time.perf_counter() - self.start, 1e-3)
        taken = (busy_seconds() - self.busy) - (self.ours() - self.own)
        return max(0.0, taken / seconds)


@dataclass
class Worker:
    """A Python peer: its interpreter, the worker's file, the model, and what it is told."""

    python: Path
    script: Path
    model: Path
    threads: int
    options: dict[str, Any] = field(default_factory=dict)
    prefix: tuple[str, ...] = ()
    variables: tuple[tuple[str, str], ...] = ()
    process: subprocess.Popen[str] | None = None

    def command(self) -> list[str]:
        told = ["--threads", str(self.threads), "--options", json.dumps(self.options)]
        return [*self.prefix, str(self.python), str(self.script), str(self.model), *told]

    def environment(self) -> dict[str, str]:
        threads = str(self.threads)
        return dict(os.environ) | {"OMP_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "0"} | dict(self.variables)

    def read(self, task: Task, seed: int) -> Reading:
        if task.kind == "start":
            return self.first_token(task.context)
        if task.kind == "memory":
            return self.memory(task, seed)
        process = self.running()
        watch = Watch(lambda: own_seconds() + process_seconds(process.pid))
        found = self.ask(task, seed)
        return Reading(found["value"], watch.others(), found["peak"])

    def running(self) -> subprocess.Popen[str]:
        if self.process is None:
            self.process = self.launch([])
            self.line()
        return self.process

    def launch(self, more: list[str]) -> subprocess.Popen[str]:
        pipe, quiet = subprocess.PIPE, subprocess.DEVNULL
        return subprocess.Popen(
            [*self.command(), *more], stdin=pipe, stdout=pipe, stderr=quiet, text=True, env=self.environment()
        )

    def ask(self, task: Task, seed: int) -> dict[str, Any]:
        process = self.running()
        stdin: IO[str] | None = process.stdin
        assert stdin is not None
        stdin.write(json.dumps({"task": task.to_dict(), "seed": seed}) + "\n")
        stdin.flush()
        return self.line()

    def line(self) -> dict[str, Any]:
        assert self.process is not None and self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            self.process = None
            raise PeerError(f"{' '.join(self.command())} ended with {code}; run it by hand to see why")
        found: dict[str, Any] = json.loads(line)
        if "error" in found:
            raise PeerError(found["error"])
        return found

    def first_token(self, context: int) -> Reading:
        """Seconds from starting a process to its first token."""
        watch = Watch(own_seconds)
        _, seconds = self.await_token(context)
        return Reading(seconds, watch.others())

    def stages(self, context: int) -> list[dict[str, Any]]:
        """What a process says of its way to the first token; ours names stages."""
        found: list[dict[str, Any]] = self.await_token(context)[0]["stages"]
        return found

    def await_token(self, context: int) -> tuple[dict[str, Any], float]:
        start = time.perf_counter()
        process = self.launch(["--first", str(context)])
        assert process.stdout is not None
        said = process.stdout.readline()
        seconds = time.perf_counter() - start
        process.wait()
        if "ready" not in said:
            raise PeerError(f"{' '.join(self.command())} --first {context} made no token")
        return json.loads(said), seconds

    def memory(self, task: Task, seed: int) -> Reading:
        """Megabytes of a process of its own, which does nothing else."""
        fresh = Worker(self.python, self.script, self.model, self.threads, self.options, self.prefix, self.variables)
        try:
            fresh.running()
            peak = fresh.ask(Task("decode", task.context, task.new), seed)["peak"]
        finally:
            fresh.close()
        return Reading(peak / 1e6, 0.0, peak)

    def close(self) -> None:
        if self.process is not None:
            end(self.process)
            self.process = None


@dataclass
class Command:
    """A peer that is a program: `arguments(task)` is its command line, `parse` finds the figure in what it prints."""

    arguments: Callable[[Task], list[str]]
    parse: Callable[[Task, str], float]

    def read(self, task: Task, seed: int) -> Reading:
        command = self.arguments(task)
        if task.kind == "memory":
            peak = peak_of_command(command)
            return Reading(peak / 1e6, 0.0, peak)
        watch, start = Watch(own_seconds), time.perf_counter()
        pipe = subprocess.PIPE
        with tempfile.TemporaryDirectory() as folder:  # for the logs that ik_llama.cpp leaves where it is started
            process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, cwd=folder)
            printed, complaints = process.communicate()
        seconds = time.perf_counter() - start
        if process.returncode:
            raise PeerError(f"{' '.join(command)} ended with {process.returncode}: {complaints[-400:]}")
        if task.kind == "start":
            return Reading(seconds, watch.others())
        # ik_llama.cpp writes its table of sequences to standard error.
        text = printed + complaints if task.kind == "batch" else printed
        return Reading(self.parse(task, text), watch.others())

    def close(self) -> None:
        return


def peak_of_command(command: list[str]) -> int:
    """The largest resident set of a program, from its end: exact, and of this child alone."""
    quiet = subprocess.DEVNULL
    process = subprocess.Popen(command, stdout=quiet, stderr=quiet)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise PeerError(f"{' '.join(command)} ended with {process.returncode}")
    return used.ru_maxrss * 1024
