"""`lowbit quantize`: any model in, a low-bit folder and the report out."""

from __future__ import annotations

import argparse
import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from lowbit.checkpoint.folder import refuse_to_replace_others
from lowbit.cli.options import LEAVE, LoadOptions, add_json, add_loading, path
from lowbit.cli.output import Output, size_text
from lowbit.cli.source import Source, find_source
from lowbit.contents import CONFIG
from lowbit.errors import LowbitError, RecipeError, check_text

if TYPE_CHECKING:
    from lowbit.formats import Format
    from lowbit.recipe import Recipe
    from lowbit.report import Report

DESCRIPTION = """\
Make a model low-bit and save it as a Hugging Face folder, with a report of every weight.

SOURCE is a Hugging Face folder, a .gguf file, or a name on the hub. OUT appears once it is complete: whatever
interrupts the work leaves nothing half-written there."""
EXAMPLES = """\
  lowbit quantize ./SmolLM2-135M ./small                          int4
  lowbit quantize model-q8_0.gguf ./small --format nf4            from a GGUF file
  lowbit quantize ./model ./small --format int4_asym_g32          any width, zero points, any group
  lowbit quantize ./model ./small --skip lm_head --skip layers.0  leave what contains these names
  lowbit quantize ./model ./small --override 'down_proj$=int8'    more bits where it matters
  lowbit quantize ./model ./small --format int4_g128 --head none  one width, dense head: as vLLM and SGLang want it
  lowbit quantize ./model ./small --json > report.json            the report for a script"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help="Hugging Face folder, .gguf file, or name on the hub")
    parser.add_argument("out", metavar="OUT", type=path, help="the folder to write")
    group = parser.add_argument_group("recipe")
    group.add_argument(
        "--format",
        default="int4",
        metavar="F",
        help="int2 .. int8, nf4, fp8_e4m3, mxfp4, q4_k, ... with suffixes; lowbit doctor lists them (default: int4)",
    )
    group.add_argument("--head", metavar="F", help=f"the format of the output head, or '{LEAVE}'")
    group.add_argument("--embedding", metavar="F", help=f"the format of the embedding, or '{LEAVE}'")
    group.add_argument(
        "--skip",
        action="append",
        default=[],
        metavar="NAME",
        help="leave weights whose path contains NAME (may be repeated)",
    )
    override_help = (
        f"another format, or '{LEAVE}', where the path matches (may be repeated; the first that matches holds)"
    )
    group.add_argument("--override", action="append", default=[], metavar="REGEX=F", help=override_help)
    group.add_argument("--rounder", metavar="R", help="rtn searches the scales, plain_rtn does not (default: rtn)")
    add_loading(parser)
    parser.add_argument("--force", action="store_true", help="replace OUT if it is a model that lowbit wrote")
    parser.add_argument(
        "--compact", action="store_true", help="store every weight once, in a form that only lowbit reads"
    )
    parser.add_argument("--all", action="store_true", help="show every weight in the report")
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    output = Output(options.json)
    recipe = recipe_from(options)
    source = find_source(options.source)
    check_target(options.out, source, options.force)
    load = LoadOptions(recipe, options.dtype, options.device, options.allow_pickle, options.trust_remote_code)
    report = quantize_and_save(source, options.out, load, output, options.threads, options.compact)
    from lowbit.cli.report import print_report

    print_report(output, report, options.all)
    output.say(
        f"\nsaved in {options.out} ({size_text(folder_bytes(options.out))} on disk); "
        f"next: lowbit chat {shlex.quote(str(options.out))}"
    )
    output.result(
        {"source": source.name, "out": str(options.out), "bytes_on_disk": folder_bytes(options.out)} | report.to_dict()
    )
    return 0


def quantize_and_save(
    source: Source, out: Path, load: LoadOptions, output: Output, threads: int | None = None, compact: bool = False
) -> Report:
    """Load a model low-bit, save it, return the report."""
    from lowbit.cli.engines import start_torch

    start_torch(threads)
    from lowbit.cli.session import load_model, load_tokenizer

    model = load_model(source, load)
    # A GGUF file's is written by the save itself.
    tokenizer = None if source.kind == "gguf" else load_tokenizer(source, load)
    if tokenizer is None and source.kind != "gguf":
        output.note("lowbit: the source has no tokenizer, so none is saved")
    model.save_low_bit(out, tokenizer=tokenizer, compact=compact)
    report: Report = model.lowbit_report
    return report


def recipe_from(options: argparse.Namespace) -> Recipe:
    """The recipe that the arguments spell."""
    from lowbit.recipe import recipe_named

    if "" in options.skip:
        raise RecipeError("--skip needs a part of a weight's path, and was given an empty one")
    recipe = recipe_named(options.format)
    # Ours first, so that they win over those that a recipe brings along.
    changes: dict[str, object] = {
        "skip": (*options.skip, *recipe.skip),
        "overrides": (*(_override(text) for text in options.override), *recipe.overrides),
    }
    if options.head is not None:
        changes["head"] = format_or_none(options.head)
    if options.embedding is not None:
        changes["embedding"] = format_or_none(options.embedding)
    if options.rounder is not None:
        changes["rounder"] = options.rounder
    return recipe.replace(**changes)


def format_or_none(name: str) -> Format | None:
    from lowbit.formats import as_format

    return None if name.strip().lower() == LEAVE else as_format(name)


def _override(text: str) -> tuple[str, Format | None]:
    pattern, equals, name = text.rpartition("=")
    if not equals or not pattern:
        raise RecipeError(
            f"--override {text!r} is not REGEX=FORMAT: write for example 'down_proj$=int8' or 'layers\\.0\\.={LEAVE}'"
        )
    return pattern, format_or_none(name)


def check_target(out: Path, source: Source, force: bool) -> None:
    """Refuse, before any work, to write where something else lies."""
    check_text(str(out), "the name of OUT")
    if out.exists() and not out.is_dir():
        raise LowbitError(f"{out} is a file: name a folder that does not exist yet")
    if out.is_mount():
        raise LowbitError(
            f"{out} is a mount point, which cannot be replaced by a folder: name one below it, {out / 'model'}"
        )
    above = next(parent for parent in out.absolute().parents if parent.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise LowbitError(f"{out} cannot be written: {above} is {'read-only for you' if above.is_dir() else 'a file'}")
    if source.kind == "folder" and out.exists() and out.samefile(source.path):
        raise LowbitError(f"{out} is the source itself: name another folder")
    if not out.exists() or not any(out.iterdir()):
        return
    if not (out / CONFIG).is_file():
        raise LowbitError(f"{out} is not empty, and what it holds is no model: name a folder that does not exist yet")
    if not force:
        raise LowbitError(f"{out} holds a model already: name another folder, or replace it with --force")
    refuse_to_replace_others(out)


def folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
