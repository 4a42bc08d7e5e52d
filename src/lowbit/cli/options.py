"""Arguments that several commands share, and the values that their words become."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowbit.errors import LowbitError, check_text

if TYPE_CHECKING:
    from lowbit.recipe import Recipe

DTYPES = ("auto", "float32", "bfloat16", "float16")
LEAVE = "none"
ENGINES = ("auto", "lowbit", "transformers")
CACHES = ("auto", "fp32", "fp16", "int8")
FORMAT_NAMES = "int4, nf4, q4_k, ...; lowbit doctor lists them"


@dataclass(frozen=True)
class LoadOptions:
    """How a model is loaded. Without a recipe it is taken as it is."""

    recipe: Recipe | None = None
    dtype: str = "auto"
    device: str | None = None
    allow_pickle: bool = False
    trust_remote_code: bool = False
    engine: str = "auto"
    context: int | None = None
    cache: str = "auto"
    check: bool = False
    within_window: bool = False
    mapped: bool = False
    imatrix: Path | None = None


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. None leaves a choice to the model's own generation config."""

    max_new_tokens: int = 256
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    ignore_end: bool = False
    prompt_cache: Path | None = None


def number(kind: Callable[[str], Any], low: float, high: float, what: str) -> Callable[[str], Any]:
    """A type for argparse: a number within limits, both included."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is not None and value > high and f"{high}" not in what:
            raise argparse.ArgumentTypeError(f"{text!r} is too large: {high} is the most")
        if value is None or not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
        return value

    return parse


COUNT = number(int, 1, 1 << 31, "a number from 1 up")
THREADS = number(int, 1, 1024, "a number of threads from 1 to 1024")
BITS = number(float, 2, 9, "a number of bits from 2 to 9")
SEED = number(int, 0, (1 << 63) - 1, "a number from 0 up")
TEMPERATURE = number(float, 0, 100, "a number from 0 (always the likeliest token) to 100")
SHARE = number(float, 1e-9, 1, "a number between 0 and 1")
PENALTY = number(float, 1e-3, 100, "a number above 0")


def path(text: str) -> Path:
    """A type for argparse: a path, in which ~ is the home folder even where no shell has put it in (`--text=~/a.txt`)."""
    return Path(text).expanduser()


def text(given: str) -> str:
    """A type for argparse: a text."""
    try:
        return check_text(given, "this")
    except LowbitError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the result as JSON, everything else on stderr")


def add_loading(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Arguments of every command that loads a model; returns their group."""
    group = parser.add_argument_group("loading")
    group.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="what the model computes in (default: what it was saved in)"
    )
    group.add_argument("--device", metavar="D", help="where it runs: cpu, cuda, cuda:1, xpu (default: cpu)")
    group.add_argument("--threads", type=THREADS, metavar="N", help="threads on the CPU (default: all cores)")
    group.add_argument(
        "--allow-pickle", action="store_true", help="also read .bin weights, which may run code of their author"
    )
    group.add_argument("--trust-remote-code", action="store_true", help="run the Python files that come with the model")
    return group


def add_model(parser: argparse.ArgumentParser, by_option: bool = False) -> None:
    """Arguments of every command that runs a model: which (by `--model` too, if asked for), made low-bit or not, loaded how,
    run by whom."""
    what = "a folder (low-bit or not), a .gguf file, or a name on the hub"
    if by_option:
        parser.add_argument("model", metavar="MODEL", nargs="?", default=argparse.SUPPRESS, help=what)
        parser.add_argument("--model", metavar="MODEL", default=argparse.SUPPRESS, help="the same, as an option")
    else:
        parser.add_argument("model", metavar="MODEL", help=what)
    group = add_loading(parser)
    group.add_argument(
        "--format",
        metavar="F",
        help=f"make the model low-bit while it loads: {FORMAT_NAMES} (default: as it is)",
    )
    group.add_argument(
        "--engine",
        choices=ENGINES,
        default="auto",
        help="who runs it: lowbit's own engine (CPU, without torch) or transformers (default: the engine for low-bit models)",
    )
    group.add_argument(
        "--context",
        type=COUNT,
        metavar="N",
        help="tokens that a prompt and its answer may have together (default: what the model was made for, at most 8192; "
        "lowbit's own engine)",
    )
    group.add_argument(
        "--cache",
        choices=CACHES,
        default="auto",
        help="what keys and values are kept in (default: int8 for low-bit models, fp16 for others; lowbit's own engine)",
    )
    group.add_argument(
        "--mapped",
        action="store_true",
        help="leave plain weights in their file: less memory of its own, slower (lowbit's own engine)",
    )
    group.add_argument(
        "--within-window",
        action="store_true",
        help="refuse a prompt longer than the model's sliding window (lowbit's own engine)",
    )
    group.add_argument(
        "--check", action="store_true", help="if a number overflows, say in which layer (slower; lowbit's own engine)"
    )


def add_prompt_cache(parser: argparse.ArgumentParser) -> None:
    """Where the state after a prompt is kept between runs."""
    parser.add_argument(
        "--prompt-cache",
        type=path,
        metavar="FILE",
        help="keep what was read of the prompt in FILE, and do not read it again (lowbit's own engine)",
    )


def add_sampling(parser: argparse.ArgumentParser, max_new_tokens: int) -> None:
    """Arguments of the commands that draw tokens."""
    group = parser.add_argument_group("sampling (default: what the model's generation config says)")
    group.add_argument(
        "--max-new-tokens",
        type=COUNT,
        default=max_new_tokens,
        metavar="N",
        help=f"stop after N tokens (default: {max_new_tokens})",
    )
    group.add_argument(
        "--temperature", type=TEMPERATURE, metavar="T", help="0 always takes the likeliest token, higher is freer"
    )
    group.add_argument("--top-k", type=COUNT, metavar="K", help="draw from the K likeliest tokens")
    group.add_argument(
        "--top-p", type=SHARE, metavar="P", help="draw from the likeliest tokens that hold a share P together"
    )
    group.add_argument("--repetition-penalty", type=PENALTY, metavar="R", help="above 1: avoid what was said already")
    group.add_argument("--seed", type=SEED, metavar="N", help="draw the same tokens every time")


def sampling_from(options: argparse.Namespace) -> Sampling:
    return Sampling(
        options.max_new_tokens,
        options.temperature,
        options.top_k,
        options.top_p,
        options.repetition_penalty,
        options.seed,
        prompt_cache=getattr(options, "prompt_cache", None),
    )


def loading_from(options: argparse.Namespace) -> LoadOptions:
    """The load options of a command; `--format` becomes a recipe."""
    from lowbit.recipe import recipe_named

    return LoadOptions(
        None if options.format is None else recipe_named(options.format),
        options.dtype,
        options.device,
        options.allow_pickle,
        options.trust_remote_code,
        options.engine,
        options.context,
        options.cache,
        options.check,
        options.within_window,
        options.mapped,
    )
