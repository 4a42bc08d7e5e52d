"""The runner: `python -m lowbit.compat script.py` becomes `python script.py`, with the old names answered.

The runner does not run the script inside itself. It replaces its own process by a plain Python that is told, through PYTHONPATH,
to answer the old names before the script starts (`child/sitecustomize.py`). So everything a script can see is Python's own:
`sys.path[0]` is the script's folder, `sys.argv` its arguments, `__main__` its module, standard input untouched; an exit code, a
traceback, Ctrl-C and `exit(0)` are what they would be without us, and a Python that the script starts is answered in the same way.
Starting Python a second time costs about 20 ms.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import TracebackType

from lowbit.compat.becoming import become
from lowbit.compat.installing import child_search_path, install
from lowbit.errors import LowbitError

USAGE = """\
usage: python -m lowbit.compat script.py [arguments of the script]
       python -m lowbit.compat -m module [arguments of the module]
       python -m lowbit.compat llm-convert|llm-cli|llm-chat|optimum-cli [arguments of that program]

Runs a script written for BigDL-LLM, ipex-llm, Intel Extension for PyTorch, Neural Compressor or Optimum Intel, as it is: its
imports (bigdl.llm, ipex_llm, intel_extension_for_pytorch, neural_compressor, optimum.intel, nncf) are answered by lowbit.

examples:
  python -m lowbit.compat generate.py --repo-id-or-model-path ./model --prompt "What is AI?"
  python -m lowbit.compat -m pytest tests
  LOWBIT_XPU=cpu python -m lowbit.compat train.py     "xpu" means the CPU (or cuda) in this script

In a process of your own: import lowbit.compat; lowbit.compat.install()
Old names beside lowbit's: docs/migration.md
"""
_MODULE, _CODE, _STANDARD_INPUT = "-m", "-c", "-"
_BAD_USAGE = 2


def run(arguments: list[str]) -> int:
    """Run what the arguments name as Python would; returns only what could not be started, or on Windows."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if arguments else _BAD_USAGE
    if not arguments[0].startswith("-") and not Path(arguments[0]).exists():
        from lowbit.compat.programs import PROGRAMS, run_program

        if arguments[0] in PROGRAMS:
            return run_program(arguments[0], arguments[1:])
    complaint = find_fault(arguments)
    if complaint:
        print(f"lowbit.compat: {complaint}", file=sys.stderr)
        return _BAD_USAGE
    command = [sys.executable, *own_options(sys.orig_argv, len(arguments)), *arguments]
    environment = os.environ | {"PYTHONPATH": child_search_path()}
    return become(command, environment)


def find_fault(arguments: list[str]) -> str | None:
    """Why these arguments cannot be run, as a sentence with the way out; None if they can."""
    first = arguments[0]
    if sys.flags.ignore_environment or sys.flags.no_site:
        return "the options -E, -I and -S keep lowbit out of the Python that runs the script: leave them out"
    if first in (_MODULE, _CODE):
        return None if len(arguments) > 1 else f"{first} needs the module or code to run after it"
    if first.startswith("-") and first != _STANDARD_INPUT:
        return f"{first} is no option: those of the script go after its name, those of Python before -m lowbit.compat"
    if first != _STANDARD_INPUT and not Path(first).exists():
        return f"there is no script {first} in {Path.cwd()}"
    return None


def own_options(original: list[str], count: int) -> list[str]:
    """The options of Python itself (-u, -X, -W): what stands in front of `-m lowbit.compat` on the whole command line."""
    options = original[1 : len(original) - count]
    while options and options[-1] in ("lowbit.compat", "lowbit.compat.__main__"):
        options.pop()
    if options and options[-1].endswith(_MODULE[1]) and options[-1].startswith("-"):
        rest = options.pop()[:-1]
        options += [rest] if rest != "-" else []
    return options


def begin() -> None:
    """What a Python does that the runner started, before its script."""
    before = sys.excepthook

    def tell(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        from lowbit.compat.xpu.absent import about_xpu

        sentence = about_xpu(error)
        if sentence is not None:
            error.add_note(sentence)
        before(kind, error, trace)

    sys.excepthook = tell
    try:
        install()
    except (
        LowbitError
    ) as error:  # a variable that says nothing: Python would go on without us, after a page of traceback
        print(f"lowbit.compat: {error}", file=sys.stderr, flush=True)
        os._exit(_BAD_USAGE)
