"""`ipex._C`: switches of that library's compiled part that scripts flip, and that turn nothing here."""

from __future__ import annotations

from typing import Any

from lowbit.compat.missing import refuse_unknown
from lowbit.compat.names import IGNORED, Name


def disable_jit_linear_repack(*_: Any) -> None:
    """Nothing is repacked."""


def enable_jit_linear_repack(*_: Any) -> None:
    """Nothing is repacked."""


__getattr__ = refuse_unknown(__name__, {})

NAMES = (
    Name(
        "intel_extension_for_pytorch._C.disable_jit_linear_repack",
        "",
        IGNORED,
        "tests/unit/test_compat_ipex.py::test_small_names",
        "nothing is repacked",
    ),
)
