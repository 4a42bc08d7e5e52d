"""What every test shares.

One torch thread, since tiny models spend more time handing work over than doing it. Examples of hypothesis that are the same in
every run, none of which fails for having taken long. And an ear for Ctrl-C: a run started in the background inherits a deaf one,
which its child processes inherit in turn, and the tests of Ctrl-C would wait in vain.
"""

from __future__ import annotations

import ctypes
import importlib.util
import signal
import sys
from collections.abc import Iterator

import pytest
import torch

torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)

if importlib.util.find_spec("hypothesis"):  # where the tests of a GPU run alone it need not be
    from hypothesis import HealthCheck, settings

    settings.register_profile(
        "same_everywhere", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
    )
    settings.load_profile("same_everywhere")

_LIBC = ctypes.CDLL(None)
_WORDS_OF_A_STACK = 3  # its address, its flags, its size


@pytest.fixture(autouse=True)
def _what_is_said_once_is_said_in_each_test() -> None:
    """Old names give each of their warnings once in a process: whichever test came first would have them all."""
    if ignored := sys.modules.get("lowbit.compat.ignored"):
        ignored._SAID.clear()


@pytest.fixture(autouse=True)
def _signals_keep_their_stack() -> Iterator[None]:
    """OpenVINO's CPU plugin puts a stack for signals under the thread. When two go in the order in which they came, as those of
    openvino_genai's pipelines do, the thread is left with one that is gone, and the next Ctrl-C is a crash in another test."""
    before = (ctypes.c_uint64 * _WORDS_OF_A_STACK)()
    known = sys.platform == "linux" and _LIBC.sigaltstack(None, before) == 0
    yield
    if known:
        _LIBC.sigaltstack(before, None)
