"""What this machine is: processor, instruction sets, cores, memory, and what of them this process may use.

A container often gets less than the machine has: cores by affinity or by a quota of time, memory by a limit. What
counts is the smallest. On Linux all of it is in /proc and /sys; elsewhere what cannot be known is None.
"""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path

_CPU_INFO, _MEMORY_INFO = Path("/proc/cpuinfo"), Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")
# The flags that matter to a kernel, as /proc/cpuinfo spells them on x86 and on ARM.
_FLAGS = (
    "avx2", "f16c", "fma", "avx_vnni", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_int8",
    "amx_bf16", "asimd", "asimddp", "i8mm", "bf16", "sve",
)  # fmt: skip


@dataclass(frozen=True)
class Machine:
    """What a process has at hand. Memory in bytes; `quota` in cores."""

    system: str
    processor: str
    flags: tuple[str, ...]
    cores: int
    usable_cores: int
    quota: float | None
    memory: int | None
    available: int | None

    @property
    def threads(self) -> int:
        """How many threads can run at once."""
        return max(1, min(self.usable_cores, round(self.quota) if self.quota else self.usable_cores))


def usable_cores() -> int:
    """Cores that this process may run on, by affinity."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def this_machine() -> Machine:
    cores = os.cpu_count() or 1
    usable = usable_cores()
    total, available = _memory()
    return Machine(
        f"{platform.system()} {platform.release()} {platform.machine()}",
        _cpu_field("model name") or platform.processor() or platform.machine(),
        _flags(),
        cores,
        usable,
        _quota(),
        total,
        available,
    )


def _cpu_field(name: str) -> str:
    """The first value of a field of /proc/cpuinfo, or an empty text."""
    if not _CPU_INFO.is_file():
        return ""
    lines = (line.partition(":") for line in _CPU_INFO.read_text().splitlines())
    return next((value.strip() for key, _, value in lines if key.strip() == name), "")


def _flags() -> tuple[str, ...]:
    present = set((_cpu_field("flags") or _cpu_field("Features")).split())
    return tuple(flag for flag in _FLAGS if flag in present)


def _quota() -> float | None:
    """The cores' worth of time that a container may use, or None without a limit."""
    path = _CGROUP / "cpu.max"
    if not path.is_file():
        return None
    limit, _, period = path.read_text().strip().partition(" ")
    return None if limit == "max" or not period else int(limit) / int(period)


def available_memory() -> int | None:
    """Bytes that this process may still take; None where that cannot be known."""
    return _memory()[1]


def _memory() -> tuple[int | None, int | None]:
    """All memory and what is free of it, both within the limit of the container."""
    if not _MEMORY_INFO.is_file():
        return None, None
    fields = {
        line.partition(":")[0]: line.split()[1] for line in _MEMORY_INFO.read_text().splitlines() if line.split()[1:]
    }
    total, available = (int(fields.get(name, 0)) * 1024 for name in ("MemTotal", "MemAvailable"))
    limit, used = _cgroup_number("memory.max"), _cgroup_number("memory.current")
    if limit is None or limit >= total:
        return total, available
    return limit, min(available, limit - (used or 0))


def _cgroup_number(name: str) -> int | None:
    path = _CGROUP / name
    text = path.read_text().strip() if path.is_file() else ""
    return int(text) if text.isdigit() else None
