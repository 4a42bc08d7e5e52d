"""`lowbit evaluate`: how well a model predicts a text, and how far it is from the one that it was made from."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowbit.cli.generate import read_text
from lowbit.cli.options import COUNT, LoadOptions, add_format_on_the_fly, add_json, add_loading, loading_from, number
from lowbit.cli.output import Output, seconds_text
from lowbit.cli.source import Source, find_source
from lowbit.errors import LowbitError

if TYPE_CHECKING:
    from lowbit.cli.session import Session

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
    parser.add_argument("model", metavar="MODEL", help="a folder (low-bit or not), a .gguf file, or a name on the hub")
    parser.add_argument("--text", type=Path, required=True, metavar="FILE", help="a text in UTF-8")
    parser.add_argument("--window", type=_WINDOW, default=512, metavar="N", help="tokens per window (default: 512)")
    parser.add_argument("--windows", type=COUNT, metavar="N", help="only the first N windows (default: the whole text)")
    parser.add_argument("--against", metavar="ORIGINAL", help="a model to compare with: the one it was made from")
    add_format_on_the_fly(parser)
    add_loading(parser)
    add_json(parser)
