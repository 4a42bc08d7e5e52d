"""Names that a face does not define: submodules and homes found when first used, everything else refused with a sentence.

    __getattr__ = refuse_unknown(__name__, {"GGUFModel": "lowbit.load_low_bit"}, homes={"optimize_model": "lowbit.optimize"})

`homes` are names that another module holds: it is imported when the name is first used, so that importing a face costs nothing.
`nearest` says what to use instead of a name that lowbit does not have; without an entry there, names that look alike are offered,
out of the face's `__all__`, its homes and its submodules.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import sys
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from lowbit.errors import LowbitError, nearest

FACES = "lowbit.compat.faces"
# What stands in for a path: no place to look, which still makes Python ask the finders for a name that is missing.
_NOWHERE: list[str] = []
_NEAREST: dict[str, Mapping[str, str]] = {}


class UnknownNameError(LowbitError, AttributeError):
    """A name of an old library that lowbit does not answer."""


class UnknownModuleError(LowbitError, ModuleNotFoundError):
    """A module of an old library, or a name imported from one, that lowbit does not answer."""


def old_name(module: str) -> str:
    """`ipex_llm.transformers` for the face of that name: what users call it."""
    return module.removeprefix(FACES + ".")


def refuse_unknown(
    module: str, nearest: Mapping[str, str], homes: Mapping[str, str] | None = None
) -> Callable[[str], Any]:
    """The `__getattr__` of the face `module`."""
    _NEAREST[module] = nearest
    # A plain module gets an empty path: with one, `from face import name` asks the finders, and the refusal is ours.
    sys.modules[module].__dict__.setdefault("__path__", _NOWHERE)
    known = dict(homes or {})

    def __getattr__(name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        if name in known:
            value = getattr(importlib.import_module(known[name]), name)
            setattr(sys.modules[module], name, value)
            return value
        if _has_submodule(module, name):
            return importlib.import_module(f"{module}.{name}")
        raise UnknownNameError(sentence(module, name, [*known, *_submodules(module)]))

    return __getattr__


def _has_submodule(module: str, name: str) -> bool:
    path = sys.modules[module].__path__
    return importlib.machinery.PathFinder.find_spec(f"{module}.{name}", path) is not None


def sentence(module: str, name: str, more: list[str]) -> str:
    """What is missing and what to use instead."""
    missing = f"lowbit has no {old_name(module)}.{name}"
    instead = _NEAREST.get(module, {}).get(name)
    if instead is not None:
        return f"{missing}: use {instead}"
    known = {*getattr(sys.modules[module], "__all__", ()), *more, *_NEAREST.get(module, {})}
    return f"{missing}: {nearest(name, known)}" if known else missing


def refuse_module(asked: str, face: str) -> UnknownModuleError:
    """The refusal of a module that no face has; `asked` is the name in the user's import."""
    parent, _, name = face.rpartition(".")
    try:  # a face knows best itself what is nearest
        getattr(importlib.import_module(parent), name)
    except UnknownNameError as refusal:
        return UnknownModuleError(str(refusal), name=old_name(asked))
    except AttributeError:
        pass
    return UnknownModuleError(sentence(parent, name, _submodules(parent)), name=old_name(asked))


def refusal_of(name: str) -> str | None:
    """Why a name of an old library, as `ipex_llm.transformers.X`, is refused where it is used; None where a face answers it."""
    top, *parts = name.split(".")
    try:
        found: Any = importlib.import_module(f"{FACES}.{top}")
        for part in parts:
            if not isinstance(found, ModuleType):
                return None
            found = getattr(found, part)
    except LowbitError as error:
        return str(error)
    return None


def _submodules(module: str) -> list[str]:
    import pkgutil  # only who errs needs it

    names = (found.name for found in pkgutil.iter_modules(sys.modules[module].__path__))
    return [name for name in names if not name.startswith("_")]
