"""`lowbit migrate`: a script of BigDL-LLM, ipex-llm, IPEX or Neural Compressor in lowbit's own names."""

from __future__ import annotations

import argparse
import difflib
import os
import tempfile
from pathlib import Path

from lowbit.cli.options import add_json, path
from lowbit.cli.output import Output
from lowbit.errors import LowbitError, MissingPackageError

DESCRIPTION = """\
Rewrite scripts written for BigDL-LLM, ipex-llm, Intel Extension for PyTorch or Neural Compressor in lowbit's own names.

Without --write nothing is changed: the difference is shown. What has no name of lowbit's own stays, is marked with a
comment and listed; such a script begins with lowbit.compat.install(), which answers it."""
EXAMPLES = """\
  lowbit migrate generate.py
  lowbit migrate generate.py train.py --write
  lowbit migrate train.py --device cpu        "xpu" becomes "cpu" in the script
  lowbit migrate generate.py --json | jq '.[0].left'"""
DEVICES = ("cpu", "cuda", "xpu")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("scripts", metavar="SCRIPT", nargs="+", type=path, help="a Python file")
    parser.add_argument("--write", action="store_true", help="change the files")
    parser.add_argument(
        "--device", metavar="D", help='what "xpu" becomes: cpu or cuda (default: it stays, the name of an Intel GPU)'
    )
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    device = options.device
    if device is not None and device.partition(":")[0] not in DEVICES:
        raise LowbitError(
            f"--device {device} is nothing that a script could run on here: name one of {', '.join(DEVICES)}"
        )
    sources = {script: _read(script) for script in options.scripts}
    try:
        from lowbit.migrate.codemod import migrate
    except ModuleNotFoundError as error:
        raise MissingPackageError(str(error.name), "rewriting scripts", "migrate") from None
    output = Output(options.json)
    results = []
    for script, source in sources.items():
        try:
            found = migrate(source, None if device == "xpu" else device)
        except LowbitError as error:
            raise LowbitError(f"{script}: {error}") from None
        diff = "".join(_difference(script, source, found.source))
        output.write(diff)
        for kind, notes in (("left as it is", found.left), ("dropped", found.dropped)):
            for note in notes:
                output.note(f"{script}:{note.line}: {kind}: {note.name}: {note.reason}")
        if diff and options.write:
            _write(script, found.source)
        output.note(f"{script}: {_summary(bool(diff), options.write, len(found.left))}")
        left, dropped = ([vars(note) for note in notes] for notes in (found.left, found.dropped))
        results.append({"script": str(script), "changed": bool(diff), "diff": diff, "left": left, "dropped": dropped})
    output.result(results)
    return 0


def _summary(changed: bool, written: bool, left: int) -> str:
    what = "nothing to translate" if not changed else "written" if written else "nothing is written without --write"
    return what + (f", {left} left as it was, marked and left to lowbit.compat" if left else "")


def _read(script: Path) -> str:
    if not script.is_file():
        raise LowbitError(f"there is no script {script}")
    try:
        # Line ends are the script's own, and stay.
        return script.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise LowbitError(f"{script} is no text in UTF-8 ({error.reason} at byte {error.start})") from None


def _write(script: Path, source: str) -> None:
    """All of the new script, or the old one: it is written beside, and takes the place."""
    target = script.resolve()
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(source.encode("utf-8"))
        Path(name).chmod(target.stat().st_mode)
        Path(name).replace(target)
    finally:
        Path(name).unlink(missing_ok=True)


def _difference(script: Path, before: str, after: str) -> list[str]:
    name = script.as_posix().lstrip("/")
    lines = difflib.unified_diff(
        before.splitlines(keepends=True), after.splitlines(keepends=True), f"a/{name}", f"b/{name}"
    )
    return [line if line.endswith("\n") else line + "\n\\ No newline at end of file\n" for line in lines]
