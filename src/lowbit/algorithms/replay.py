"""Replay: a function of tensors that is called over and over with the same shapes, as one launch on an NVIDIA GPU.

Rounding 64 columns of a small weight is some 800 operations of a few microseconds each, and a GPU gets them from Python no
faster than one in six. Recorded as a CUDA graph they follow one another without Python: GPTQ of the reference model took
four fifths of its time there before.

The function may change its arguments, which are copies, and must neither read a number back nor depend on anything but the
shapes. What it returns holds until the next call with these shapes. Other devices call it as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import lru_cache

import torch

Arguments = tuple[torch.Tensor | None, ...]
Function = Callable[..., tuple[torch.Tensor, ...]]

# Recordings that are held, each with room for what the function computes.
_HELD = 16
# Beyond so many numbers an operation takes longer than its launch, and a recording would only hold memory.
_LARGEST = 1 << 21


class _Recording:
    """One function on tensors of given shapes, its arguments' places, and what it left there."""

    def __init__(self, function: Function, given: Arguments, fixed: Hashable) -> None:
        self.places = tuple(None if tensor is None else tensor.clone() for tensor in given)
        # What is made once on a device, tables of levels among it, cannot be made while recording.
        function(*self.places, fixed)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.result = function(*self.places, fixed)

    def __call__(self, given: Arguments) -> tuple[torch.Tensor, ...]:
        for place, tensor in zip(self.places, given, strict=True):
            if place is not None and tensor is not None:
                place.copy_(tensor)
        self.graph.replay()
        return self.result


class _Shapes:
    """The key of a recording: arguments that look alike are equal."""

    def __init__(self, given: Arguments) -> None:
        self.given = given
        self.looks = tuple(None if t is None else (tuple(t.shape), t.dtype, t.device) for t in given)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Shapes) and self.looks == other.looks

    def __hash__(self) -> int:
        return hash(self.looks)


@lru_cache(maxsize=_HELD)
def _recording(function: Function, shapes: _Shapes, fixed: Hashable) -> _Recording:
    recording = _Recording(function, shapes.given, fixed)
    shapes.given = ()
    return recording


def replayed(function: Function, *given: torch.Tensor | None, fixed: Hashable) -> tuple[torch.Tensor, ...]:
    """What `function(*given, fixed)` returns."""
    tensors = [tensor for tensor in given if tensor is not None]
    device = tensors[0].device
    if device.type != "cuda" or torch.version.hip or sum(tensor.numel() for tensor in tensors) > _LARGEST:
        return function(*(None if tensor is None else tensor.clone() for tensor in given), fixed)
    with torch.inference_mode(False), torch.no_grad(), torch.cuda.device(device):
        return _recording(function, _Shapes(given), fixed)(given)
