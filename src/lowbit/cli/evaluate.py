"""`lowbit evaluate`: how well a model predicts a text, and how far it is from the one that it was made from."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowbit.cli.engines import is_installed
from lowbit.cli.generate import read_text
from lowbit.cli.options import (
    COUNT,
    LoadOptions,
    add_json,
    add_model,
    loading_from,
    number,
)
from lowbit.cli.output import Output
from lowbit.cli.source import Source, find_source
from lowbit.errors import LowbitError, RecipeError
from lowbit.progress import progress

if TYPE_CHECKING:
    from lowbit.cli.engine_evaluate import Measured
    from lowbit.cli.engines import AnySession
    from lowbit.evaluate import Divergence, Perplexity

DESCRIPTION = """\
Measure a model on a text file: perplexity (lower is better) over windows of tokens that do not overlap.

With --against, also how far its predictions are from another model's with the same tokenizer: the mean Kullback-Leibler
divergence (0 means the same), and how often both find the same token likeliest."""
EXAMPLES = """\
  lowbit evaluate ./small --text moby_dick.txt
  lowbit evaluate ./small --text moby_dick.txt --against ./SmolLM2-135M
  lowbit evaluate ./SmolLM2-135M --format int3 --text moby_dick.txt --windows 20
  lowbit evaluate ./small --text moby_dick.txt --json | jq .perplexity"""
_WINDOW = number(int, 2, 1 << 31, "a number from 2 up (a token is predicted from those before it)")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("--text", type=Path, required=True, metavar="FILE", help="a text in UTF-8")
    parser.add_argument("--window", type=_WINDOW, default=512, metavar="N", help="tokens per window (default: 512)")
    parser.add_argument("--windows", type=COUNT, metavar="N", help="only the first N windows (default: the whole text)")
    parser.add_argument("--against", metavar="ORIGINAL", help="a model to compare with: the one it was made from")
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    output = Output(options.json)
    text = read_text(options.text)
    source, load = find_source(options.model), loading_from(options)
    original = find_source(options.against) if options.against else None
    from lowbit.cli.engines import open_session

    session = open_session(source, load, options.threads)
    tokens = tokens_of(session, text, options)
    facts: dict[str, Any] = {"model": options.model, "text": str(options.text), "window": options.window}
    if original is None:
        measured = measure_perplexity(session, tokens, options)
        print_perplexity(output, measured)
        output.result(facts | perplexity_facts(measured))
        return 0
    distance = measure_distance(session, original, tokens, options)
    print_perplexity(output, distance.perplexity)
    print_distance(output, distance)
    output.result(
        facts | perplexity_facts(distance.perplexity) | {"against": distance_facts(distance, options.against)}
    )
    return 0


def tokens_of(session: AnySession, text: str, options: argparse.Namespace) -> Any:
    """The text as windows of tokens [windows, window]."""
    try:
        return _measures().cut_windows(session.plain_tokens(text), options.window, options.windows)
    except RecipeError as error:
        raise LowbitError(f"{options.text}: {error}") from None


def measure_perplexity(session: AnySession, tokens: Any, options: argparse.Namespace) -> Perplexity | Measured:
    with progress("predicting", len(tokens)) as advance:
        measured: Perplexity | Measured = _measures().perplexity(
            session.model, tokens, window=options.window, progress=advance
        )
    return measured


def _measures() -> Any:
    """Where perplexity is measured: in torch, or in numpy where torch is absent."""
    return importlib.import_module("lowbit.evaluate" if is_installed("torch") else "lowbit.cli.engine_evaluate")


def measure_distance(session: AnySession, source: Source, tokens: Any, options: argparse.Namespace) -> Divergence:
    """Both models side by side on the same tokens. The original is loaded as it is, whatever --format says."""
    from lowbit.cli.session import load_model
    from lowbit.evaluate import divergence

    plain = LoadOptions(None, options.dtype, options.device, options.allow_pickle, options.trust_remote_code)
    original = load_model(source, plain).eval()
    ours, theirs = session.vocabulary, original.config.get_text_config().vocab_size
    if ours != theirs:
        raise LowbitError(f"{options.model} knows {ours} tokens and {source.name} {theirs}: they cannot be compared")
    with progress("comparing", len(tokens)) as advance:
        return divergence(session.model, original, tokens, window=options.window, progress=advance)


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


def print_perplexity(output: Output, measured: Perplexity | Measured) -> None:
    # The error of exp(nll), to first order.
    error = measured.ppl * measured.standard_error
    output.facts(
        [
            ("perplexity", f"{measured.ppl:.4f} +- {error:.4f}"),
            ("measured on", f"{measured.tokens} tokens in {measured.windows} windows"),
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
