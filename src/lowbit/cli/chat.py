"""`lowbit chat`: a conversation that keeps its history.

Each line is a message. At a terminal there is a prompt, line editing and Ctrl-C, which ends an answer and not the
program; through a pipe the lines are answered one after another, and the end of the input ends the conversation.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from lowbit.cli.generate import answer_aloud
from lowbit.cli.options import (
    Sampling,
    add_model,
    add_prompt_cache,
    add_sampling,
    loading_from,
    sampling_from,
    text,
)
from lowbit.cli.output import Output
from lowbit.cli.source import find_source
from lowbit.errors import LowbitError, check_text, nearest

if TYPE_CHECKING:
    from lowbit.cli.engines import AnySession

DESCRIPTION = """\
Talk with a model. What was said so far is kept, and put before it with its chat template.

In the conversation: /help, /reset, /save FILE, /exit. Ctrl-C stops an answer, Ctrl-D leaves."""
EXAMPLES = """\
  lowbit chat ./small
  lowbit chat ./small --system "Answer in one sentence." --temperature 0.7
  lowbit chat ./SmolLM2-135M --format int4
  printf 'Hello!\\nWhat did I just say?\\n' | lowbit chat ./small"""
DEFAULT_NEW_TOKENS = 512
_PROMPT = "> "
_HELP = """\
/help       this list
/reset      forget what was said
/save FILE  write the conversation into a file, as JSON
/exit       leave (so does Ctrl-D); Ctrl-C stops an answer"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("--system", type=text, metavar="TEXT", help="how the model shall behave")
    add_sampling(parser, DEFAULT_NEW_TOKENS)
    add_prompt_cache(parser)


def run(options: argparse.Namespace) -> int:
    source, load = find_source(options.model), loading_from(options)
    from lowbit.cli.engines import open_session

    chat = Chat(open_session(source, load, options.threads), sampling_from(options), options.system)
    if sys.stdin.isatty():
        import readline  # noqa: F401  importing it gives `input` arrow keys and a history

        chat.output.note("type a message; /help lists what else there is")
    while (line := _read_line()) is not None and chat.take(line):
        pass
    return 0


def _read_line() -> str | None:
    """The next line, or None at the end of the input."""
    try:
        return input(_PROMPT) if sys.stdin.isatty() else input()
    except EOFError:
        if sys.stdin.isatty():
            print(file=sys.stderr)  # the shell's prompt begins a line of its own
        return None
    except KeyboardInterrupt:
        if not sys.stdin.isatty():
            raise
        print("\n(/exit or Ctrl-D leaves)", file=sys.stderr)
        return ""


@dataclass
class Chat:
    """A conversation: its history, and what each line of the user does."""

    session: AnySession
    sampling: Sampling
    system: str | None = None
    messages: list[dict[str, str]] = field(default_factory=list)
    output: Output = field(default_factory=Output)

    def __post_init__(self) -> None:
        self.reset("")

    def take(self, line: str) -> bool:
        """Do what a line says; False ends the conversation."""
        text = line.strip()
        if text.startswith("/"):
            return self._obey(text)
        if text:
            self._answer(text)
        return True

    def _obey(self, text: str) -> bool:
        name, _, rest = text.partition(" ")
        if name in ("/exit", "/quit"):
            return False
        commands: dict[str, Callable[[str], None]] = {"/help": self.help, "/reset": self.reset, "/save": self.save}
        if name in commands:
            commands[name](rest.strip())
        else:
            self.output.note(f"lowbit: there is no {name}: {nearest(name, [*commands, '/exit'])}")
        return True

    def help(self, _: str) -> None:
        self.output.note(_HELP)

    def reset(self, _: str) -> None:
        self.messages = [{"role": "system", "content": self.system}] if self.system else []

    def save(self, name: str) -> None:
        """Write the conversation; a failure is said, and the conversation goes on."""
        if not name:
            self.output.note("lowbit: /save needs the name of a file")
            return
        try:
            Path(name).expanduser().write_text(
                json.dumps(self.messages, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
            )
        except OSError as error:
            self.output.note(f"lowbit: {name} was not written: {error.strerror}")
        else:
            self.output.note(f"saved {len(self.messages)} messages in {name}")

    def _answer(self, text: str) -> None:
        """Add a message and its answer to the history; of a stopped answer, what was shown."""
        said: list[str] = []
        try:
            check_text(text, "this line")
        except LowbitError as error:
            self.output.note(f"lowbit: {error}")
            return

        def emit(piece: str) -> None:
            said.append(piece)
            self.output.write(piece)

        self.messages.append({"role": "user", "content": text})
        try:
            answer_aloud(self.session, self.session.encode_chat(self.messages), self.sampling, emit)
        except KeyboardInterrupt:
            self.output.note(" [stopped]")
        except LowbitError as error:
            self.messages.pop()
            self.output.note(f"lowbit: {error} (/reset forgets what was said)")
            return
        self.output.say()
        self.messages.append({"role": "assistant", "content": "".join(said).strip()})
