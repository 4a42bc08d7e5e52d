"""torch.xpu and torch.accelerator when "xpu" is the CPU: one device, always done, whose memory is the process's."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import FunctionType, SimpleNamespace
from typing import Any

import torch

from lowbit.compat.replacing import Replacement
from lowbit.compat.xpu.meaning import VARIABLE, XPU, Meaning, is_available
from lowbit.machine import available_memory, this_machine, usable_cores

NAME = f"the CPU ({VARIABLE}=cpu)"
_STATUS = Path("/proc/self/status")
_KIB = 1024


class Stream:
    """A queue of work that is always empty: what is called on the CPU is done when the call returns."""

    def __init__(self, device: Any = None, priority: int = 0, **_: Any) -> None:
        self.device, self.priority = torch.device("cpu"), priority

    def synchronize(self) -> None:
        return None

    def query(self) -> bool:
        return True

    def is_capturing(self) -> bool:
        return False

    def wait_stream(self, stream: Any) -> None:
        return None

    def wait_event(self, event: Any) -> None:
        return None

    def record_event(self, event: Event | None = None) -> Event:
        event = Event() if event is None else event
        event.record(self)
        return event

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        return None


class Event:
    """A moment; its times are those of the clock."""

    def __init__(self, enable_timing: bool = False, **_: Any) -> None:
        self.moment: float | None = None

    def record(self, stream: Any = None) -> None:
        self.moment = time.perf_counter()

    def elapsed_time(self, end_event: Event) -> float:
        """Milliseconds."""
        if self.moment is None or end_event.moment is None:
            raise RuntimeError("both events must be recorded before their time is asked for")
        return 1e3 * (end_event.moment - self.moment)

    def query(self) -> bool:
        return True

    def wait(self, stream: Any = None) -> None:
        return None

    def synchronize(self) -> None:
        return None


CURRENT = Stream()


class StreamContext:
    """Work goes to a stream inside of it: to the one there is."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def __enter__(self) -> Any:
        return self.stream

    def __exit__(self, *_: object) -> None:
        return None


def stream(stream: Any) -> StreamContext:
    return StreamContext(stream)


class device:
    """Another device is the current one inside of it: the one there is. torch asks of an argument whether it is one of these."""

    def __init__(self, device: Any) -> None:
        self.idx = 0

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        return None


class device_of(device):
    """The same, for the device of a tensor."""


def memory_allocated(device: Any = None) -> int:
    """Bytes of memory that the process holds now; 0 where the system does not say."""
    return _status("VmRSS")


def max_memory_allocated(device: Any = None) -> int:
    """Bytes that it held at most."""
    return _status("VmHWM")


def _status(field: str) -> int:
    if not _STATUS.is_file():
        return 0
    lines = [line for line in _STATUS.read_text().splitlines() if line.startswith(field)]
    return int(lines[0].split()[1]) * _KIB if lines else 0


def memory_stats(device: Any = None) -> dict[str, int]:
    now, most = memory_allocated(), max_memory_allocated()
    kinds = ("allocated_bytes", "reserved_bytes")
    return {f"{kind}.all.{what}": value for kind in kinds for what, value in (("current", now), ("peak", most))}


def memory_stats_as_nested_dict(device: Any = None) -> dict[str, Any]:
    """`memory_stats`, a level for each part of a name."""
    nested: dict[str, Any] = {}
    for name, value in memory_stats().items():
        *path, last = name.split(".")
        level = nested
        for part in path:
            level = level.setdefault(part, {})
        level[last] = value
    return nested


def mem_get_info(device: Any = None) -> tuple[int, int]:
    """Bytes that are free, and all of them."""
    return available_memory() or 0, this_machine().memory or 0


def get_device_properties(device: Any = None) -> SimpleNamespace:
    total, cores = this_machine().memory or 0, usable_cores()
    return SimpleNamespace(
        name=NAME,
        type="cpu",
        total_memory=total,
        max_compute_units=cores,
        gpu_eu_count=cores,
        has_fp16=True,
        has_fp64=True,
        platform_name="lowbit",
        driver_version="",
    )


def nothing(*_: Any, **__: Any) -> None:
    """What there is to do when all work is done and nothing is cached."""


def yes(*_: Any, **__: Any) -> bool:
    return True


def no(*_: Any, **__: Any) -> bool:
    return False


def first(*_: Any, **__: Any) -> int:
    """The number of the one device."""
    return 0


def one(*_: Any, **__: Any) -> int:
    """How many devices there are."""
    return 1


def current_stream(device: Any = None) -> Stream:
    return CURRENT


def current_accelerator(check_available: bool = False) -> torch.device:
    return torch.device(XPU)


def dtypes_of_the_cpu(device: Any = None) -> dict[str, set[torch.dtype]]:
    """What `torch.accelerator.get_device_capability` tells of a device."""
    return {"supported_dtypes": {value for value in vars(torch).values() if isinstance(value, torch.dtype)}}


def get_rng_state(device: Any = XPU) -> torch.Tensor:
    return torch.default_generator.get_state()


def set_rng_state(new_state: torch.Tensor, device: Any = XPU) -> None:
    torch.default_generator.set_state(new_state)


def get_rng_state_all() -> list[torch.Tensor]:
    return [get_rng_state()]


def set_rng_state_all(new_states: Iterable[torch.Tensor]) -> None:
    for state in new_states:
        set_rng_state(state)


def manual_seed(seed: int) -> None:
    torch.default_generator.manual_seed(int(seed))


def seed() -> None:
    torch.default_generator.seed()


def initial_seed() -> int:
    return torch.default_generator.initial_seed()


MEMORY = {
    "empty_cache": nothing,
    "max_memory_allocated": max_memory_allocated,
    "max_memory_reserved": max_memory_allocated,
    "memory_allocated": memory_allocated,
    "memory_reserved": memory_allocated,
    "memory_stats": memory_stats,
    "reset_accumulated_memory_stats": nothing,
    "reset_peak_memory_stats": nothing,
}
XPU_NAMES: dict[str, Any] = MEMORY | {
    "Event": Event,
    "Stream": Stream,
    "StreamContext": StreamContext,
    "can_device_access_peer": no,
    "current_device": first,
    "current_stream": current_stream,
    "default_generators": (torch.default_generator,),
    "device": device,
    "device_count": one,
    "device_of": device_of,
    "get_arch_list": list,
    "get_device_capability": lambda device=None: vars(get_device_properties()),
    "get_device_name": lambda device=None: NAME,
    "get_device_properties": get_device_properties,
    "get_gencode_flags": str,
    "get_rng_state": get_rng_state,
    "get_rng_state_all": get_rng_state_all,
    "init": nothing,
    "initial_seed": initial_seed,
    "is_available": is_available,
    "is_bf16_supported": yes,
    "is_current_stream_capturing": no,
    "is_initialized": yes,
    "is_tf32_supported": no,
    "manual_seed": manual_seed,
    "manual_seed_all": manual_seed,
    "mem_get_info": mem_get_info,
    "memory_snapshot": list,
    "memory_stats_as_nested_dict": memory_stats_as_nested_dict,
    "seed": seed,
    "seed_all": seed,
    "set_device": nothing,
    "set_rng_state": set_rng_state,
    "set_rng_state_all": set_rng_state_all,
    "set_stream": nothing,
    "stream": stream,
    "synchronize": nothing,
}
ACCELERATOR_NAMES: dict[str, Any] = MEMORY | {
    "current_accelerator": current_accelerator,
    "current_device_idx": first,
    "current_device_index": first,
    "current_stream": current_stream,
    "device_count": one,
    "device_index": device,
    "empty_host_cache": nothing,
    "get_device_capability": dtypes_of_the_cpu,
    "get_memory_info": mem_get_info,
    "is_available": yes,
    "set_device_idx": nothing,
    "set_device_index": nothing,
    "set_stream": nothing,
    "synchronize": nothing,
}


def replacements(meaning: Meaning) -> Iterator[Replacement]:
    """torch.xpu, torch.accelerator, and the methods of tensors that need a device besides the CPU."""
    for owner, names in ((torch.xpu, XPU_NAMES), (torch.accelerator, ACCELERATOR_NAMES)):
        for name, value in names.items():
            ours = isinstance(value, FunctionType) and value.__module__ == __name__
            yield Replacement(owner, name, of_its_own(value) if ours else value)
    yield Replacement(torch.xpu, "is_available", is_available)
    yield Replacement(torch.Tensor, "pin_memory", lambda self, device=None: self)
    yield Replacement(torch.Tensor, "record_stream", of_its_own(nothing))


def of_its_own(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of the same doing: torch's compiler keeps a table by function, and refuses one under two names."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return call
