"""`lowbit bench`: how fast a model answers on this machine."""

from __future__ import annotations

import argparse
import sys

from lowbit.bench import Timings, measure, prompt_of
from lowbit.cli import bench_woq
from lowbit.cli.options import (
    COUNT,
    Sampling,
    add_json,
    add_model,
    loading_from,
    number,
)
from lowbit.cli.output import Output, seconds_text, size_text
from lowbit.cli.source import find_source
from lowbit.errors import LowbitError
from lowbit.progress import progress

DESCRIPTION = """\
Time a model: loading, the first token after a prompt, the later tokens (mean, P90, P99), peak memory.

The prompt is always the same text, cut to length; the answer is not stopped at its end. One round warms up before
the rounds that count."""
EXAMPLES = """\
  lowbit bench ./small
  lowbit bench ./small --prompt-tokens 1024 --new-tokens 128 --threads 4
  lowbit bench ./SmolLM2-135M --format int4 --rounds 5
  lowbit bench ./small --prompt-tokens 512 --profile
  lowbit bench ./small --json | jq .tokens_per_second
  lowbit bench --woq --benchmark --model ./small --num_beams 4"""
WRONG_USAGE = 2
_PROMPT = "The quick brown fox jumps over the lazy dog while seven wise owls count the stars above a quiet harbour. "
# The parts of a step as the engine names them, in the order in which they run.
_PARTS = {
    "embed": "embedding",
    "norm": "norms, rounding of activations",
    "qkv": "queries, keys, values",
    "rope": "rotation, storing in the cache",
    "attention": "attention",
    "output": "attention's output",
    "mlp": "MLP",
    "head": "head",
    "barriers": "waiting for other threads",
}
_AT_LEAST_TWO = number(int, 2, 1 << 31, "a number from 2 up (the first token is timed apart from the later ones)")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser, by_option=True)
    parser.add_argument(
        "--prompt-tokens", type=COUNT, default=32, metavar="N", help="length of the prompt (default: 32)"
    )
    parser.add_argument(
        "--new-tokens", type=_AT_LEAST_TWO, default=64, metavar="N", help="length of the answer (default: 64)"
    )
    parser.add_argument("--rounds", type=COUNT, default=3, metavar="N", help="rounds that count (default: 3)")
    parser.add_argument(
        "--profile", action="store_true", help="also show where the time goes, part by part (lowbit's own engine only)"
    )
    add_json(parser)
    bench_woq.add_arguments(parser)


def run(options: argparse.Namespace) -> int:
    if not hasattr(options, "model"):
        print("lowbit: error: which MODEL? (see 'lowbit bench --help')", file=sys.stderr)
        return WRONG_USAGE
    if bench_woq.is_asked(options):
        return bench_woq.run(options, _PROMPT)
    output = Output(options.json)
    source, load = find_source(options.model), loading_from(options)
    from lowbit.cli.engine_session import EngineSession
    from lowbit.cli.engines import open_session

    session = open_session(source, load, options.threads)
    if options.profile and not isinstance(session, EngineSession):
        raise LowbitError("only lowbit's own engine counts its parts: leave out --profile, or add --engine lowbit")
    needed, context = options.prompt_tokens + options.new_tokens, session.context_length
    if context is not None and needed > context:
        raise LowbitError(
            f"prompt and answer have {needed} tokens, and the model's context {context}: ask for fewer of either"
        )
    prompt = prompt_of(session.encode(_PROMPT, raw=True), options.prompt_tokens)

    def generate(new_tokens: int) -> tuple[float, ...]:
        session.forget()
        return session.generate(prompt, Sampling(new_tokens, temperature=0, ignore_end=True)).token_seconds

    with progress("timing", options.rounds + 1, still=True) as advance:
        timings = measure(generate, len(prompt), options.new_tokens, options.rounds, advance)
    facts = timings.to_dict() | {"load_seconds": session.load_seconds, "peak_bytes": session.peak_memory()}
    cache = session.cache if isinstance(session, EngineSession) else None
    print_timings(output, timings, session.load_seconds, session.peak_memory(), cache)
    if isinstance(session, EngineSession) and options.profile:
        with progress("profiling"):
            reading, later = session.profile(prompt, options.new_tokens)
        print_profile(output, reading, later)
        facts |= {"profile": {"prompt": reading, "later": later}}
    output.result({"model": options.model, "cache": cache} | facts)
    return 0


def print_timings(
    output: Output, timings: Timings, load_seconds: float, peak_bytes: int, cache: str | None = None
) -> None:
    reading = f"{timings.prompt_tokens} tokens ({timings.prompt_tokens_per_second:.0f} tokens/s)"
    later = (
        f"{seconds_text(timings.later_mean)} mean, {seconds_text(timings.later_p90)} P90, "
        f"{seconds_text(timings.later_p99)} P99 ({timings.tokens_per_second:.1f} tokens/s)"
    )
    output.facts(
        [
            ("load", seconds_text(load_seconds)),
            ("first token", f"{seconds_text(timings.first_token)} for {reading}"),
            ("later tokens", later),
            ("peak memory", size_text(peak_bytes)),
            *([("keys and values", cache)] if cache else []),
            ("measured", f"{timings.rounds} rounds of {timings.new_tokens} tokens after one to warm up"),
        ]
    )


def print_profile(output: Output, reading: dict[str, int], later: dict[str, int]) -> None:
    """Where one thread's time goes, while the prompt is read and by later token."""
    whole = [sum(counted[part] for part in _PARTS) or 1 for counted in (reading, later)]
    tokens = max(later["steps"], 1)
    headers = ("one thread's time", "prompt ms", "prompt %", "later us a token", "later %")
    rows = [
        (
            name,
            f"{reading[part] / 1e6:.2f}",
            f"{100 * reading[part] / whole[0]:.1f}",
            f"{later[part] / tokens / 1e3:.1f}",
            f"{100 * later[part] / whole[1]:.1f}",
        )
        for part, name in _PARTS.items()
    ]
    rows.append(("together", f"{whole[0] / 1e6:.2f}", "100.0", f"{whole[1] / tokens / 1e3:.1f}", "100.0"))
    output.say()
    output.table(headers, rows, right=headers[1:])
    output.say(f"{later['barrier_count'] / tokens:.0f} times a token the threads wait for one another")
