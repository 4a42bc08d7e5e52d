"""What to say beside an error of torch about an Intel GPU that is not there.

Only torch's own words for that are met, not every error in which somebody says "xpu": a file of that name that is missing, a
device that is misspelt, a name that torch.xpu never had have nothing to do with LOWBIT_XPU.
"""

from __future__ import annotations

import sys
from types import TracebackType

from lowbit.compat.xpu.meaning import VARIABLE
from lowbit.errors import LowbitError

_TORCHS_WORDS = (
    "Torch not compiled with XPU enabled",
    "without ATen_xpu library",
    "not linked with support for xpu devices",
    "from the 'XPU' backend",
    "on a XPU device but torch.xpu.is_available() is False",
    "No XPU devices are available",
    "xpu is not available",  # transformers' pipelines
    # What Intel Extension for PyTorch added, and LOWBIT_XPU adds.
    "module 'torch.xpu' has no attribute 'amp'",
    "module 'torch.xpu' has no attribute 'optimize'",
)
# A stream or an event: the same words for a GPU of any kind, so that it matters where they are said.
_WORDS_OF_ALL = "Tried to instantiate dummy base class"
_PLACE = "torch.xpu"


def about_xpu(error: BaseException) -> str | None:
    """What to do when a script's "xpu" is no device here; None for every other error."""
    torch = sys.modules.get("torch")
    if torch is None or isinstance(error, LowbitError) or torch.xpu.is_available():
        return None
    words = str(error)
    if not any(known in words for known in _TORCHS_WORDS) and not (
        words.startswith(_WORDS_OF_ALL) and _is_from_torch_xpu(error.__traceback__)
    ):
        return None
    return (
        f'lowbit.compat: torch sees no Intel GPU here; {VARIABLE}=cpu (or cuda) in front of the command lets "xpu" mean that '
        "device in the script"
    )


def _is_from_torch_xpu(trace: TracebackType | None) -> bool:
    while trace is not None:
        if str(trace.tb_frame.f_globals.get("__name__")).startswith(_PLACE):
            return True
        trace = trace.tb_next
    return False
