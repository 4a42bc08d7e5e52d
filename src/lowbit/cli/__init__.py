"""The command `lowbit`: a table of commands, of which only the one that was asked for is imported.

    lowbit COMMAND ... -> COMMANDS[name] -> its module's add_arguments(parser), then run(options) -> exit code

A command is one file with `DESCRIPTION`, `EXAMPLES`, `add_arguments` and `run`, and one line in the table. This file
imports neither torch nor rich, and no command does so before its arguments have been read: help and usage errors come
at once.

Exit codes: 0 done, 1 a failure that is said in one line on stderr, 2 wrong usage, 130 stopped by Ctrl-C (129 or 143 by
SIGHUP or SIGTERM), 141 the reader of our output has gone. A traceback is a bug of ours, never an answer to what the user did.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol, cast

import lowbit
from lowbit.cli.failures import explain_failure
from lowbit.cli.process import Ended, forget_stdout, say_stopped, well_behaved
from lowbit.errors import LowbitError, nearest

OK, FAILED, USAGE, INTERRUPTED, PIPE_CLOSED = 0, 1, 2, 130, 141
_SIGNALLED = 128  # and the number of the signal, as shells count


class CommandModule(Protocol):
    """What the file of a command offers."""

    DESCRIPTION: str
    EXAMPLES: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None: ...

    def run(self, options: argparse.Namespace) -> int: ...


@dataclass(frozen=True)
class Command:
    """A row of the table: where a command lives, and its line in the help."""

    module: str
    help: str


COMMANDS: dict[str, Command] = {
    "demo": Command("lowbit.cli.demo", "the whole way once, on a small model that comes as a package"),
    "quantize": Command("lowbit.cli.quantize", "make a model low-bit and save it, with a report of every layer"),
    "export": Command("lowbit.cli.export", "write a model in OpenVINO's form, compared with its source"),
    "generate": Command("lowbit.cli.generate", "answer one prompt, word by word"),
    "chat": Command("lowbit.cli.chat", "talk with a model"),
    "inspect": Command("lowbit.cli.inspect", "what lies in a checkpoint: layers, formats, sizes"),
    "evaluate": Command("lowbit.cli.evaluate", "perplexity on a text, and the distance from the original model"),
    "compare": Command("lowbit.cli.compare", "several recipes beside each other, with plots of error and quality"),
    "bench": Command("lowbit.cli.bench", "time to the first token, to the later ones, memory"),
    "migrate": Command("lowbit.cli.migrate", "rewrite a script of the old systems in lowbit's own names"),
    "doctor": Command("lowbit.cli.doctor", "what is installed, what this machine can do, what is wrong"),
}

EXAMPLES = """\
examples:
  lowbit demo                                        see everything once
  lowbit quantize ./SmolLM2-135M ./small             int4, with a report
  lowbit chat ./small                                talk with it
  lowbit quantize model.gguf ./small --format nf4    a GGUF file as the source
  lowbit doctor                                      is this machine ready?

`lowbit COMMAND --help` explains a command.
The exit code is 0 when it is done, 1 if it failed, 2 for wrong usage, 130 for Ctrl-C."""


class Parser(argparse.ArgumentParser):
    """Says what is wrong with the arguments in one line."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """A misspelt option is named before what is missing for want of it."""
        known = self._option_string_actions
        given = itertools.takewhile(lambda word: word != "--", args or ())
        for name in (word.partition("=")[0] for word in given if word.startswith("--")):
            if " " not in name and name not in known:  # with one in it argparse takes it for a text
                self.error(f"there is no option {name}: {self._bare(name) or nearest(name, known, count=1)}")
        return super().parse_args(args, namespace)

    def _bare(self, name: str) -> str:
        """What other programs want a name for, and this command takes by its place."""
        places = [str(action.metavar) for action in self._actions if not action.option_strings and action.metavar]
        word = name.removeprefix("--").partition("-")[0]
        wanted = {"model": 0, "source": 0, "input": 0, "out": 1, "output": 1, "save": 1}.get(word, len(places))
        return f"{places[wanted]} has no name in '{self.prog} {' '.join(places)}'" if wanted < len(places) else ""

    def error(self, message: str) -> NoReturn:
        command = self.prog.partition(" ")[2]
        self.exit(USAGE, f"lowbit: error: {message} (see 'lowbit {command + ' ' if command else ''}--help')\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line, return the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    with well_behaved():
        return _exit_code(words)


def _exit_code(words: list[str]) -> int:
    try:
        code = _run(words)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        say_stopped()
        return INTERRUPTED
    except Ended as end:
        say_stopped()
        return _SIGNALLED + end.number
    except BrokenPipeError:
        forget_stdout()
        return PIPE_CLOSED
    except (LowbitError, OSError, ImportError, RuntimeError, MemoryError) as error:
        sentence = explain_failure(error)
        if sentence is None:
            raise
        print(f"lowbit: error: {sentence}", file=sys.stderr)
        return FAILED


def _run(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help") or words == ["help"]:
        print(_help(), end="")
        return OK
    if words[0] in ("-V", "--version"):
        print(f"lowbit {lowbit.__version__}")
        return OK
    if words[0] == "help":
        words = [words[1], "--help"]
    name, *rest = words
    if name not in COMMANDS:
        what = "option" if name.startswith("-") else "command"
        hint = "see 'lowbit --help'" if what == "option" else nearest(name, COMMANDS, count=1)
        print(f"lowbit: error: there is no {what} {name!r}: {hint}", file=sys.stderr)
        return USAGE
    module = cast(CommandModule, importlib.import_module(COMMANDS[name].module))
    try:
        options = command_parser(name, module).parse_args(rest)
    except SystemExit as stop:  # how argparse ends on --help and on errors, after it has printed
        return stop.code if isinstance(stop.code, int) else USAGE
    return module.run(options)


def command_parser(name: str, module: CommandModule) -> argparse.ArgumentParser:
    """The parser of one command."""
    parser = Parser(
        prog=f"lowbit {name}",
        description=module.DESCRIPTION,
        epilog="examples:\n" + module.EXAMPLES.rstrip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    module.add_arguments(parser)
    return parser


def _help() -> str:
    width = len("-V, --version") + 2
    lines = [
        "usage: lowbit COMMAND ...",
        "",
        "Make a model low-bit, and run, save and load it on the hardware at hand.",
        "",
    ]
    lines += ["commands:"] + [f"  {name:<{width}}{command.help}" for name, command in COMMANDS.items()]
    lines += ["", "options:", f"  {'-h, --help':<{width}}this text", f"  {'-V, --version':<{width}}the version"]
    return "\n".join([*lines, "", EXAMPLES]) + "\n"
