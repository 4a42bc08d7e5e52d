"""What every Python imports before its script when this folder is on its PYTHONPATH: the runner's way into child processes.

The name hides a `sitecustomize` that the machine may have, so that one is run first, from the next place on the path. A child
may be another Python, without lowbit: then lowbit alone is made importable from where it lies, if that Python is new enough for it.
"""

import importlib.util
import sys
from importlib.machinery import PathFinder
from pathlib import Path

_OLDEST = (3, 11)


def _run_hidden() -> None:
    """Run the `sitecustomize` that this one hides; a Python without one is the usual case."""
    here = str(Path(__file__).parent)
    sys.path[:] = [place for place in sys.path if place != here]
    spec = PathFinder.find_spec("sitecustomize", sys.path)
    if spec is not None and spec.loader is not None:
        module = importlib.util.module_from_spec(spec)
        sys.modules["sitecustomize"] = module
        spec.loader.exec_module(module)


def _import_lowbit() -> None:
    """lowbit under its own name, from the folder that this file is in, where the path does not lead to one."""
    if importlib.util.find_spec("lowbit") is not None:
        return
    root = Path(__file__).parents[2]
    spec = importlib.util.spec_from_file_location(
        "lowbit", root / "__init__.py", submodule_search_locations=[str(root)]
    )
    if spec is not None and spec.loader is not None:
        module = importlib.util.module_from_spec(spec)
        sys.modules["lowbit"] = module
        spec.loader.exec_module(module)


_run_hidden()
if sys.version_info >= _OLDEST:
    _import_lowbit()
    from lowbit.compat.runner import begin

    begin()
