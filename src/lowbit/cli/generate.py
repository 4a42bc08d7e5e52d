"""`lowbit generate`: one prompt, one answer, shown as it comes."""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from lowbit.cli.options import (
    add_json,
    add_model,
    add_prompt_cache,
    add_sampling,
    loading_from,
    path,
    sampling_from,
    text,
)
from lowbit.cli.output import Output, count_of, seconds_text, size_text
from lowbit.cli.source import find_source
from lowbit.errors import CheckpointError, LowbitError, check_text
from lowbit.progress import progress

if TYPE_CHECKING:
    from lowbit.cli.answer import Answer, Emit
    from lowbit.cli.engines import AnySession
    from lowbit.cli.options import Sampling

DESCRIPTION = """\
Answer one prompt. The text appears as it is made; the speed is said on stderr at the end.

If the model has a chat template the prompt becomes a user's message; --raw continues the text as it stands."""
EXAMPLES = """\
  lowbit generate ./small --prompt "Why is the sky blue?"
  lowbit generate ./small --prompt "Once upon a time" --raw --temperature 0.8 --seed 1
  lowbit generate ./SmolLM2-135M --format int4 --prompt "Name three colours."
  cat letter.txt | lowbit generate ./small --prompt - --max-new-tokens 64
  lowbit generate ./small --prompt-file book.txt --prompt-cache book.cache
  lowbit generate ./small --prompt "2 + 2 =" --json"""
DEFAULT_NEW_TOKENS = 256


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", type=text, metavar="TEXT", help="the prompt; '-' reads it from stdin")
    prompt.add_argument("--prompt-file", type=path, metavar="FILE", help="a file that holds the prompt; '-' is stdin")
    parser.add_argument(
        "--system", type=text, metavar="TEXT", help="how the model shall behave, for chat templates that know it"
    )
    parser.add_argument("--raw", action="store_true", help="continue the prompt as it stands, without a chat template")
    add_sampling(parser, DEFAULT_NEW_TOKENS)
    add_prompt_cache(parser)
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    output = Output(options.json)
    prompt = read_prompt(options)
    source, load = find_source(options.model), loading_from(options)
    from lowbit.cli.engines import open_session

    session = open_session(source, load, options.threads)
    tokens = session.encode(prompt, options.system, options.raw)
    answer = answer_aloud(session, tokens, sampling_from(options), output.write)
    output.say()
    output.note(speed_line(session, answer))
    output.result(answer_facts(session, answer))
    return 0


def answer_aloud(session: AnySession, tokens: list[int], sampling: Sampling, emit: Emit) -> Answer:
    """An answer, handed to `emit` as it comes; until it begins there is a sign that the prompt is being read."""
    with contextlib.ExitStack() as reading:
        reading.enter_context(progress(f"reading {len(tokens)} tokens"))

        def begin(piece: str) -> None:
            reading.close()
            emit(piece)

        return session.generate(tokens, sampling, begin)


def read_prompt(options: argparse.Namespace) -> str:
    stdin = "-" in (options.prompt, str(options.prompt_file))
    if options.prompt_file is not None and not stdin:
        return read_text(options.prompt_file)
    prompt: str = check_text(sys.stdin.read(), "stdin") if stdin else options.prompt
    if not prompt.strip():
        raise LowbitError("the prompt is empty: give the model some text to answer")
    return prompt


def read_text(path: Path) -> str:
    """A text that has something in it."""
    try:
        found = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(
            f"{path} is no text in UTF-8 ({error.reason} at byte {error.start}): convert it first"
        ) from None
    if not found.strip():
        raise CheckpointError(f"{path} is empty: name a file with some text in it")
    return found


def speed_line(session: AnySession, answer: Answer) -> str:
    speed = f", {answer.tokens_per_second:.1f} tokens/s" if answer.new_tokens > 1 else ""
    return (
        f"[{count_of(answer.prompt_tokens, 'token')} read, first token after {seconds_text(answer.first_token_seconds)}; "
        f"{count_of(answer.new_tokens, 'token')} written{speed}; peak memory {size_text(session.peak_memory())}]"
    )


def answer_facts(session: AnySession, answer: Answer) -> dict[str, object]:
    return {
        "text": answer.text,
        "prompt_tokens": answer.prompt_tokens,
        "new_tokens": answer.new_tokens,
        "load_seconds": session.load_seconds,
        "first_token_seconds": answer.first_token_seconds,
        "tokens_per_second": answer.tokens_per_second,
        "peak_bytes": session.peak_memory(),
    }
