"""The face of `bigdl`, of which lowbit answers `bigdl.llm`: the same module as `ipex_llm`."""

from __future__ import annotations

import importlib
from typing import Any

from lowbit.compat.missing import FACES, refuse_unknown

__all__ = ["llm"]

_refuse = refuse_unknown(__name__, dict.fromkeys(("chronos", "dllib", "friesian", "nano", "orca"), "bigdl.llm"))


def __getattr__(name: str) -> Any:
    return importlib.import_module(f"{FACES}.ipex_llm") if name == "llm" else _refuse(name)
