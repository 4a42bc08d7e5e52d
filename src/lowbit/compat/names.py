"""The table of old names: each face declares its rows beside its code, and this file gathers them.

    NAMES = (
        Name("ipex_llm.optimize_model", "lowbit.optimize_model", WORKS, "tests/unit/test_compat_ipex_llm.py::test_optimize_model"),
    )

`old` is the dotted name as its users write it, with a parameter in brackets where a row is about one:
`ipex_llm.optimize_model(lightweight_bmm=)`. `ours` is lowbit's own name for it, or a command, and empty where there is none.

    python -m lowbit.compat.names > docs/migration.md

makes the page from the rows. A test holds page and rows against the code: a name that works resolves, a name of ours exists, a
test is there.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

# The old name does what it did, through lowbit.
WORKS = "works"
# Accepted, without effect: a warning says so once, with the reason.
IGNORED = "ignored"
# Raises where it is used, with a sentence that says what to use instead.
REFUSED = "refused"
STATUSES = (WORKS, IGNORED, REFUSED)


@dataclass(frozen=True)
class Name:
    """An old name, ours, its status, the test that shows it (`file::function`), and a remark for its user."""

    old: str
    ours: str
    status: str
    test: str
    remark: str = ""


def collect() -> dict[str, tuple[Name, ...]]:
    """All rows, by the system whose names they are."""
    faces = importlib.import_module("lowbit.compat.faces")
    rows: dict[str, tuple[Name, ...]] = dict.fromkeys(SYSTEMS, ())
    for found in pkgutil.walk_packages(faces.__path__, f"{faces.__name__}."):
        module = importlib.import_module(found.name)
        system = found.name.removeprefix(f"{faces.__name__}.").partition(".")[0]
        rows[system if system in SYSTEMS else "ipex_llm"] += tuple(vars(module).get("NAMES", ()))
    rows["torch.xpu"] += importlib.import_module("lowbit.compat.xpu.names").NAMES
    return {system: tuple(sorted(found, key=lambda row: row.old)) for system, found in rows.items()}


SYSTEMS = {
    "ipex_llm": ("BigDL-LLM and ipex-llm", "Each name is answered under `bigdl.llm` and under `ipex_llm`."),
    "intel_extension_for_pytorch": ("Intel Extension for PyTorch", "`import intel_extension_for_pytorch as ipex`."),
    "neural_compressor": ("Neural Compressor", "Its transformers-like API, and the script that came with it."),
    "optimum": (
        "Optimum Intel",
        "Needs `lowbit[openvino]`. An `optimum` of your own stays what it is beside `optimum.intel`.",
    ),
    "nncf": ("NNCF", "The compression of weights. Needs `lowbit[openvino]`."),
    "torch.xpu": (
        "PyTorch on Intel GPU",
        "On a machine where torch sees an Intel GPU these are torch's own. Elsewhere `LOWBIT_XPU=cuda` or `LOWBIT_XPU=cpu` lets "
        '`"xpu"` mean that device, under the runner or after `install`; without the variable nothing is touched.\n\n'
        "What is redirected is where a device enters torch, and nothing pretends further. A tensor says where it really is: under "
        '`LOWBIT_XPU=cpu`, `x.to("xpu").device.type` is `"cpu"`, and a script that asks whether it is `"xpu"` is told no; ask '
        '`x.is_xpu`, which is true. `torch.device("xpu")` itself stays what it is, so that its name is printed, saved and compared '
        "as the script wrote it, and differs from the device of the tensors that were put there.",
    ),
}
_HEAD = """# Old scripts

Scripts written for BigDL-LLM, ipex-llm, Intel Extension for PyTorch, Neural Compressor, Optimum Intel and PyTorch on Intel GPU
run as they are:

```text
python -m lowbit.compat script.py --its --own arguments
LOWBIT_XPU=cpu python -m lowbit.compat script.py
```

The runner starts `python script.py` with the old names answered, in the script and in every Python that it starts. In a process of
your own, one call does the same, before the old names are imported: `lowbit.compat.install()`, in a `conftest.py` for one.
`import lowbit` alone answers no name but its own. `lowbit migrate script.py` shows the script in lowbit's own names instead, and
writes it with `--write`; what has none is marked, and goes on being answered.

Below is every old name, lowbit's own name for it, and what happens to a script that uses it: it **works**; it is **ignored**, with
a warning that gives the reason once; or it is **refused** where it is used, with a sentence that says what to use instead.
This page is made from the code by `python -m lowbit.compat.names`, and a test holds it there.
"""
_SHIMS = """
## What today's libraries call differently

An old script meets today's transformers and peft before it meets lowbit. These old calls work under the runner and after `install`,
and are named once when a script makes them.

"""
_MODULES = """
Modules of transformers:

"""
_ARGUMENTS = """
Arguments of `TrainingArguments`, and of the command lines that `HfArgumentParser` reads:

"""


def page() -> str:
    """docs/migration.md."""
    return "\n".join([_HEAD, *_systems(), _shims()])


def _systems() -> Iterator[str]:
    for system, rows in collect().items():
        title, sentence = SYSTEMS[system]
        cells = ((_code(row.old), _code(row.ours), row.status, row.remark, _code(row.test)) for row in rows)
        yield f"## {title}\n\n{sentence}\n\n" + table(("old name", "lowbit", "", "remark", "test"), cells)


def _shims() -> str:
    from lowbit.compat.shims import SHIMS
    from lowbit.compat.shims.gone import FAST_MODULES, GONE_MODULES, MOVED_MODULES
    from lowbit.compat.shims.trainer import ARGUMENTS, VALUES

    calls = table(("old call", "today", "test"), ((_code(shim.old), shim.reason, _code(shim.test)) for shim in SHIMS))
    tests = "tests/unit/test_compat_shims.py::"
    moved = (
        (_code(old), f"is {now} today", _code(f"{tests}test_modules_that_are_elsewhere"))
        for old, now in (*MOVED_MODULES.items(), FAST_MODULES)
    )
    gone = (
        (_code(old), f"**refused**: use {now}", _code(f"{tests}test_modules_that_are_gone"))
        for old, now in GONE_MODULES.items()
    )
    modules = table(("import", "today", "test"), (*moved, *gone))
    rows = {_code(old): argument.reason for old, argument in ARGUMENTS.items()}
    rows |= {
        _code(f"{name}={old!r}"): f"is {now!r} today" for name, values in VALUES.items() for old, now in values.items()
    }
    arguments = table(("argument", "today"), sorted(rows.items()))
    return f"{_SHIMS.lstrip()}{calls}{_MODULES}{modules}{_ARGUMENTS}{arguments}".rstrip("\n")


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """A table of Markdown."""
    lines = [head, tuple("---" for _ in head), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def _code(text: str) -> str:
    return f"`{text}`" if text else ""


if __name__ == "__main__":
    # Run as a program this file is a second module of its own; the rows are made by the first.
    sys.stdout.write(importlib.import_module("lowbit.compat.names").page() + "\n")
