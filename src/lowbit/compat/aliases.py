"""Old import names, answered: `bigdl.llm.transformers` and `ipex_llm.transformers` are one module, a face of ours.

A finder in front of Python's own knows the old top names. For `bigdl.llm.x` it imports `lowbit.compat.faces.ipex_llm.x` and enters
that same module under the name that was asked for, so that a class reached through either name is one class. Faces import one
another, and are known to pickle, under their real names.

A module that no face has is refused with a sentence that names the nearest one; the same finder sees `from face import name` for a
name that is missing, because Python asks for a submodule of that name then, and answers with the sentence instead of Python's own,
which would not say what to use. Who only asks whether a module is there (`importlib.util.find_spec`, as
libraries do before they import one) is told no.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import FrameType, ModuleType
from typing import TYPE_CHECKING

from lowbit.compat.missing import FACES, refuse_module

if TYPE_CHECKING:
    from importlib.abc import Loader, MetaPathFinder
else:  # names alone: importing their home takes 8 ms
    Loader = MetaPathFinder = object

ALIASES = {
    "bigdl": f"{FACES}.bigdl",
    "bigdl.llm": f"{FACES}.ipex_llm",
    "ipex_llm": f"{FACES}.ipex_llm",
    "intel_extension_for_pytorch": f"{FACES}.intel_extension_for_pytorch",
    "neural_compressor": f"{FACES}.neural_compressor",
    "nncf": f"{FACES}.nncf",
    "optimum": f"{FACES}.optimum",
    "optimum.exporters.openvino": f"{FACES}.optimum.exporters.openvino",
    "optimum.intel": f"{FACES}.optimum.intel",
}
# Packages that may be there for more than what lowbit answers: they stay, and only the deeper names above are answered in them.
SHARED = ("bigdl", "optimum")


def face_of(name: str) -> str | None:
    """The module of ours that answers an old name; None for every other name."""
    head, tail = name, ""
    while head:
        if head in ALIASES:
            return ALIASES[head] + tail
        head, _, last = head.rpartition(".")
        tail = f".{last}{tail}"
    return None


class AliasLoader(Loader):
    """Enters a module under another name too."""

    def __init__(self, home: str) -> None:
        self.home = home

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        # What the import returns is read from the table again after this: so it is that module, untouched.
        sys.modules[module.__name__] = importlib.import_module(self.home)


class AliasFinder(MetaPathFinder):
    """Answers the old names, and steps aside for all others."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.startswith(FACES + "."):
            found = PathFinder.find_spec(fullname, path, target)
            if found is None:
                _refuse_import(fullname, fullname, sys._getframe(1))
            return found
        face = face_of(fullname)
        if face is None or _stays(fullname):
            return None
        found = importlib.util.find_spec(face)
        if found is None:
            _refuse_import(fullname, face, sys._getframe(1))
            return None
        is_package = found.submodule_search_locations is not None
        return ModuleSpec(fullname, AliasLoader(face), origin=found.origin, is_package=is_package)


def _stays(name: str) -> bool:
    """Whether a name belongs to a package that is there and stays."""
    top = name.partition(".")[0]
    deeper = (old for old in ALIASES if old.startswith(f"{top}."))
    answered = any(name == old or name.startswith(f"{old}.") for old in deeper)
    return top in SHARED and not answered and PathFinder.find_spec(top) is not None


def _refuse_import(asked: str, face: str, caller: FrameType) -> None:
    """Refuse a module that is not there to who imports it, and not to who only asks for it."""
    while caller.f_back is not None and caller.f_globals.get("__name__") == "importlib._bootstrap":
        caller = caller.f_back
    if caller.f_globals.get("__name__") != importlib.util.__name__:
        raise refuse_module(asked, face)


def remove(finder: AliasFinder) -> None:
    """Take the finder away, and the old names that it entered."""
    if finder in sys.meta_path:
        sys.meta_path.remove(finder)
    for name, module in list(sys.modules.items()):
        if face_of(name) is not None and getattr(module, "__name__", FACES).startswith(FACES):
            del sys.modules[name]
