"""`ipex._C`: switches of that library's compiled part that scripts flip, and that turn nothing here."""

from __future__ import annotations

from typing import Any

from lowbit.compat.ignored import say_ignored
from lowbit.compat.missing import refuse_unknown
from lowbit.compat.names import IGNORED, Name

_NOTHING = "nothing is repacked"


def disable_jit_linear_repack(*_: Any) -> None:
    say_ignored("ipex._C", "disable_jit_linear_repack", _NOTHING)


def enable_jit_linear_repack(*_: Any) -> None:
    say_ignored("ipex._C", "enable_jit_linear_repack", _NOTHING)


__getattr__ = refuse_unknown(__name__, {})

NAMES = tuple(
    Name(
        f"intel_extension_for_pytorch._C.{way}able_jit_linear_repack",
        "",
        IGNORED,
        "tests/unit/test_compat_ipex.py::test_small_switches",
        _NOTHING,
    )
    for way in ("dis", "en")
)
