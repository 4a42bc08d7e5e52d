"""Where a device enters torch: each of these functions takes "xpu" for the device that is meant, and goes on as before.

A wrapper looks at the argument `device` (and, where a device may stand without its name, at strings and devices among the others)
and calls torch's own function. That costs under a microsecond a call, and `torch.compile` looks through it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils import _device

from lowbit.compat.replacing import Replacement
from lowbit.compat.xpu.meaning import XPU, Meaning

# The functions of torch that make tensors; a test holds the list against torch's own.
FACTORIES = (
    "arange", "as_tensor", "asarray", "bartlett_window", "blackman_window", "empty", "empty_like", "empty_permuted",
    "empty_quantized", "empty_strided", "eye", "from_file", "full", "full_like", "hamming_window", "hann_window",
    "kaiser_window", "linspace", "logspace", "normal", "ones", "ones_like", "rand", "rand_like", "randint",
    "randint_like", "randn", "randn_like", "randperm", "range", "scalar_tensor", "sparse_bsc_tensor",
    "sparse_bsr_tensor", "sparse_compressed_tensor", "sparse_coo_tensor", "sparse_csc_tensor", "sparse_csr_tensor",
    "tensor", "tril_indices", "triu_indices", "zeros", "zeros_like",
)  # fmt: skip
FACTORIES_ELSEWHERE = (("fft", "fftfreq"), ("fft", "rfftfreq"), ("nested", "nested_tensor"))
NEW_TENSORS = ("new_empty", "new_empty_strided", "new_full", "new_ones", "new_tensor", "new_zeros")
# Questions about autocast whose first argument is the kind of a device.
AUTOCAST_QUESTIONS = ("get_autocast_dtype", "is_autocast_enabled", "set_autocast_dtype", "set_autocast_enabled")

Wrapper = Callable[..., Any]


def replacements(meaning: Meaning) -> Iterator[Replacement]:
    """All of them, for one meaning of "xpu"."""
    # Remembered by torch on first use: it must be torch's own functions that it remembers.
    _device._device_constructors()
    yield from factories(meaning)
    yield from methods(meaning)
    yield from contexts(meaning)
    yield from autocast(meaning)
    yield Replacement(torch, "Generator", generator_class(meaning))
    yield from files(meaning)
    yield from profiles(meaning)


def by_name(original: Wrapper, meaning: Meaning) -> Wrapper:
    """For functions whose device is always called `device`."""

    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("device") is not None:
            kwargs["device"] = meaning.of_place(kwargs["device"])
        return original(*args, **kwargs)

    return call


def anywhere(original: Wrapper, meaning: Meaning) -> Wrapper:
    """For functions whose device may stand at any place: everything that is a device is looked at."""

    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("device") is not None:
            kwargs["device"] = meaning.of_place(kwargs["device"])
        return original(*[meaning.of(argument) for argument in args], **kwargs)

    return call


def at_first(original: Wrapper, meaning: Meaning, name: str) -> Wrapper:
    """For functions whose first argument, also called `name`, is a device."""

    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        if args:
            return original(meaning.of_place(args[0]), *args[1:], **kwargs)
        if name in kwargs:
            kwargs[name] = meaning.of_place(kwargs[name])
        return original(**kwargs)

    return call


def factories(meaning: Meaning) -> Iterator[Replacement]:
    for name in FACTORIES:
        yield Replacement(torch, name, by_name(getattr(torch, name), meaning))
    for module, name in FACTORIES_ELSEWHERE:
        owner = getattr(torch, module)
        yield Replacement(owner, name, by_name(getattr(owner, name), meaning))


def methods(meaning: Meaning) -> Iterator[Replacement]:
    """Those of tensors; modules move tensor by tensor, and so come through here."""
    tensor = torch.Tensor
    to = tensor.to

    @functools.wraps(to)
    def moved(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if kwargs.get("device") is not None:
            kwargs["device"] = meaning.of_place(kwargs["device"])
        if args:
            args = (meaning.of_place(args[0]), *args[1:])
        return to(self, *args, **kwargs)

    def xpu(
        self: torch.Tensor,
        device: Any = None,
        non_blocking: bool = False,
        memory_format: torch.memory_format = torch.preserve_format,
    ) -> torch.Tensor:
        place = meaning.of_place(
            XPU if device is None else torch.device(XPU, device) if isinstance(device, int) else device
        )
        return to(self, place, non_blocking=non_blocking, memory_format=memory_format)

    yield Replacement(tensor, "to", moved)
    yield Replacement(tensor, "xpu", xpu)
    yield Replacement(tensor, "is_xpu", property(lambda self: self.device.type == meaning.kind))
    for name in NEW_TENSORS:
        yield Replacement(tensor, name, by_name(getattr(tensor, name), meaning))


def contexts(meaning: Meaning) -> Iterator[Replacement]:
    """`with torch.device("xpu"):` and `torch.set_default_device("xpu")`."""
    begin = _device.DeviceContext.__init__

    @functools.wraps(begin)
    def begin_with(self: _device.DeviceContext, device: Any) -> None:
        begin(self, meaning.of_place(device))

    yield Replacement(_device.DeviceContext, "__init__", begin_with)


def autocast(meaning: Meaning) -> Iterator[Replacement]:
    """Mixed precision: the context, its questions, and the scaler of gradients."""
    context, scaler = torch.amp.autocast_mode.autocast, torch.amp.grad_scaler.GradScaler
    enter, begin, default_dtype = context.__init__, scaler.__init__, torch.get_autocast_dtype(XPU)

    @functools.wraps(enter)
    def entered(
        self: Any,
        device_type: str,
        dtype: torch.dtype | None = None,
        enabled: bool = True,
        cache_enabled: bool | None = None,
    ) -> None:
        if device_type == XPU and dtype is None:
            dtype = default_dtype  # an Intel GPU's, float16, and not the CPU's
        enter(self, meaning.of(device_type), dtype=dtype, enabled=enabled, cache_enabled=cache_enabled)

    @functools.wraps(begin)
    def scaling(self: Any, device: str = "cuda", *args: Any, **kwargs: Any) -> None:
        # Without a word about the device, a scaler is CUDA's; where there is none it would switch itself off.
        unsaid = device == "cuda" and not torch.cuda.is_available()
        begin(self, meaning.of(XPU if unsaid else device), *args, **kwargs)

    yield Replacement(context, "__init__", entered)
    yield Replacement(scaler, "__init__", scaling)
    for name in AUTOCAST_QUESTIONS:
        yield Replacement(torch, name, at_first(getattr(torch, name), meaning, "device_type"))
    for owner in (torch.amp, torch.amp.autocast_mode):
        available = at_first(torch.amp.autocast_mode.is_autocast_available, meaning, "device_type")
        yield Replacement(owner, "is_autocast_available", available)
        for name in ("custom_fwd", "custom_bwd"):
            yield Replacement(owner, name, of_a_kind(getattr(torch.amp.autocast_mode, name), meaning))


def of_a_kind(original: Wrapper, meaning: Meaning) -> Wrapper:
    """For the decorators that are told the kind of a device by name."""

    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        if "device_type" in kwargs:
            kwargs["device_type"] = meaning.of(kwargs["device_type"])
        return original(*args, **kwargs)

    return call


def generator_class(meaning: Meaning) -> type:
    """torch.Generator, which is a class of C: ours makes torch's, and takes torch's for its own."""
    original = torch.Generator

    class Made(type(original)):  # type: ignore[misc]
        def __call__(cls, device: Any = "cpu") -> torch.Generator:
            return original(meaning.of_place(device))

        def __instancecheck__(cls, instance: object) -> bool:
            return isinstance(instance, original)

    return Made("Generator", (original,), {"__module__": "torch", "__doc__": original.__doc__})


def files(meaning: Meaning) -> Iterator[Replacement]:
    """`torch.load`: `map_location="xpu"`, and files that were saved on an Intel GPU."""
    restore = torch.serialization.default_restore_location

    @functools.wraps(restore)
    def restored(storage: Any, location: str) -> Any:
        return restore(storage, meaning.of(location))  # type: ignore[no-untyped-call]

    yield Replacement(torch.serialization, "default_restore_location", restored)


def profiles(meaning: Meaning) -> Iterator[Replacement]:
    """`ProfilerActivity.XPU`, and tables sorted by an "xpu" time."""
    xpu = torch.profiler.ProfilerActivity.XPU
    other = getattr(torch.profiler.ProfilerActivity, meaning.kind.upper())
    profile, events = torch.profiler.profiler._KinetoProfile, torch.autograd.profiler_util.EventList
    begin, table = profile.__init__, events.table

    @functools.wraps(begin)
    def profiling(self: Any, *args: Any, activities: Any = None, **kwargs: Any) -> None:
        if activities is not None:
            asked = list(activities)
            activities = [activity for activity in asked if activity != xpu]
            activities += [other] if xpu in asked and other not in asked else []
        begin(self, *args, activities=activities, **kwargs)

    @functools.wraps(table)
    def sorted_table(self: Any, sort_by: str | None = None, *args: Any, **kwargs: Any) -> str:
        return table(self, sort_by and sort_by.replace(XPU, meaning.kind), *args, **kwargs)  # type: ignore[no-any-return, no-untyped-call]

    yield Replacement(profile, "__init__", profiling)
    yield Replacement(events, "table", sorted_table)
