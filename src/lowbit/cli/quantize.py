"""`lowbit quantize`: any model in, a low-bit folder and the report out."""

from __future__ import annotations

import argparse
import os
import shlex
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowbit.checkpoint.folder import refuse_to_replace_others
from lowbit.cli.failures import is_no_memory
from lowbit.cli.options import BITS, COUNT, LEAVE, LoadOptions, add_json, add_loading, path
from lowbit.cli.output import Output, count_of, size_text
from lowbit.cli.process import Ended
from lowbit.cli.source import Source, find_source
from lowbit.contents import CONFIG
from lowbit.errors import LowbitError, RecipeError, check_text
from lowbit.options import LENGTH, OPTION_RECIPES, RECIPE, ROUNDER_OPTIONS, SAMPLES, SCALER_OPTIONS, parse_options
from lowbit.texts import TEXT_NAMES

if TYPE_CHECKING:
    from lowbit.calibration import Calibration
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
  lowbit quantize ./model ./small --algorithm gptq --format int4_g64 --calibration text.txt    rounded for what it reads
  lowbit quantize ./model ./small --algorithm gptq --scaler awq --format int4_g64 --calibration text.txt    scaled first
  lowbit quantize ./model ./small --algorithm autoround --algorithm-option recipe=best --format int2_g32    tuned for long
  lowbit quantize ./model ./small --algorithm gptq --calibration default --calibration own    rounded for what it writes, too
  lowbit quantize ./model ./small --algorithm gptq --resume ./unfinished    goes on there after a kill
  lowbit quantize ./model ./small --format int4_asym_g32 --imatrix imatrix.dat    inputs weighed as llama.cpp weighs them
  lowbit quantize ./model ./small --format w8a8 --scaler smoothquant    8-bit products, a scale for each row
  lowbit quantize ./model ./small --format w8a8_static --scaler smoothquant    a range for each layer, in a JSON file
  lowbit quantize ./model ./small --format int4_g64 --bits 3.5    2 to 8 bits a weight, where they save most
  lowbit quantize ./model ./small --json > report.json            the report for a script"""
EXAMPLES += "\n\noptions of algorithms and scalers, with their defaults:\n" + "\n".join(
    textwrap.fill(f"{name:<12}{options().defaults_text()}", 100, initial_indent="  ", subsequent_indent=" " * 14)
    for name, options in (ROUNDER_OPTIONS | SCALER_OPTIONS).items()
)


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
    add_algorithms(parser)
    add_loading(parser)
    parser.add_argument("--force", action="store_true", help="replace OUT if it is a model that lowbit wrote")
    parser.add_argument(
        "--compact", action="store_true", help="store every weight once, in a form that only lowbit reads"
    )
    parser.add_argument("--all", action="store_true", help="show every weight in the report")
    add_json(parser)


def add_algorithms(parser: argparse.ArgumentParser) -> None:
    """How codes and scales are chosen, and what is looked at for it."""
    group = parser.add_argument_group("algorithm")
    group.add_argument(
        "--algorithm",
        "--rounder",
        dest="rounder",
        metavar="A",
        help=f"{', '.join(ROUNDER_OPTIONS)}: who chooses codes and scales (default: rtn)",
    )
    group.add_argument(
        "--scaler", metavar="S", help=f"{', '.join(SCALER_OPTIONS) or 'none yet'}: who scales inputs first"
    )
    for kind in ("algorithm", "scaler"):
        group.add_argument(
            f"--{kind}-option",
            action="append",
            default=[],
            metavar="NAME=V",
            help=f"an option of the {kind} (may be repeated); they are listed below{_recipes(kind)}",
        )
    group.add_argument(
        "--calibration",
        action="append",
        metavar="TEXT",
        help="a text file like what the model will read, 'own' for what the model writes by itself, or a name: "
        f"{', '.join(TEXT_NAMES)}; several share the windows (default: default, where the algorithm needs one)",
    )
    group.add_argument(
        "--imatrix",
        type=path,
        metavar="FILE",
        help="weigh the inputs of weights by llama.cpp's importance matrix instead of a text (rtn)",
    )
    group.add_argument(
        "--bits",
        type=BITS,
        metavar="B",
        help="give each weight 2 to 8 bits, B per weight in all with its scales, where they save most (int formats)",
    )
    group.add_argument("--samples", type=COUNT, metavar="N", help="windows of the text (default: 128)")
    group.add_argument("--length", type=COUNT, metavar="N", help="tokens of a window (default: 512)")
    group.add_argument(
        "--resume",
        type=path,
        metavar="FOLDER",
        help="keep finished blocks in FOLDER, and go on from those that it holds",
    )
    group.add_argument(
        "--spill", type=path, metavar="FOLDER", help="keep activations in files of FOLDER instead of in memory"
    )


def _recipes(kind: str) -> str:
    """The names of options that a kind of algorithm has together."""
    table = ROUNDER_OPTIONS if kind == "algorithm" else SCALER_OPTIONS
    found = [f"; {name}: {RECIPE}={', '.join(OPTION_RECIPES[name])}" for name in table if name in OPTION_RECIPES]
    return "".join(found)


def run(options: argparse.Namespace) -> int:
    output = Output(options.json)
    recipe = recipe_from(options)
    calibrating = calibrating_from(options, recipe)
    source = find_source(options.source)
    check_target(options.out, source, options.force)
    check_beside(options.out, resume=options.resume, spill=options.spill)
    load = LoadOptions(recipe, options.dtype, options.device, options.allow_pickle, options.trust_remote_code)
    load = replace(load, imatrix=options.imatrix)
    with _telling_what_is_kept(calibrating, output):
        report = quantize_and_save(source, options.out, load, output, options.threads, options.compact, calibrating)
    from lowbit.cli.report import print_report

    print_report(output, report, options.all)
    output.say(
        f"\nsaved in {options.out} ({size_text(folder_bytes(options.out))} on disk); "
        f"next: lowbit chat {shlex.quote(str(options.out))}"
    )
    if calibrating is not None and calibrating.resume is not None:
        kept = size_text(folder_bytes(calibrating.resume))
        output.say(f"the finished blocks in {calibrating.resume} ({kept}) are no longer needed")
    output.result(
        {"source": source.name, "out": str(options.out), "bytes_on_disk": folder_bytes(options.out)} | report.to_dict()
    )
    return 0


@dataclass(frozen=True)
class Calibrating:
    """What is looked at while the model is quantised, and where finished blocks are kept."""

    texts: tuple[str, ...]
    samples: int
    length: int
    resume: Path | None = None
    spill: Path | None = None
    bits: float | None = None


@contextmanager
def _telling_what_is_kept(calibrating: Calibrating | None, output: Output) -> Iterator[None]:
    """What ends a calibration early is followed by where it goes on, or could have."""
    try:
        yield
    except RecipeError:  # what is kept is of another command
        raise
    except (KeyboardInterrupt, Ended):
        if calibrating is not None:
            kept = _kept_in(calibrating.resume)
            output.note(f"\n{kept or 'lowbit: no finished block was kept: --resume FOLDER keeps them'}")
        raise
    except (LowbitError, OSError, RuntimeError, MemoryError) as error:
        if calibrating is not None:
            for line in (_kept_in(calibrating.resume), _what_takes_less(calibrating) if is_no_memory(error) else ""):
                if line:
                    output.note(line)
        raise


def _what_takes_less(calibrating: Calibrating) -> str:
    """A line for those whose memory ran out."""
    spill = "" if calibrating.spill is not None else "--spill FOLDER keeps them in files, and "
    held = f"activations of {calibrating.samples} x {calibrating.length} tokens"
    return f"lowbit: {held} were looked at: {spill}fewer --samples or a shorter --length take less"


def _kept_in(folder: Path | None) -> str:
    """A line for the finished blocks in a folder, if there are any."""
    if folder is None or not folder.is_dir():
        return ""
    from lowbit.blockwise.resume import finished_blocks

    count = finished_blocks(folder)
    return f"lowbit: {count_of(count, 'finished block')} in {folder}: the same command goes on there" if count else ""


def calibrating_from(options: argparse.Namespace, recipe: Recipe) -> Calibrating | None:
    """What the arguments say about calibration, or None where there is none."""
    if options.calibration is None and not recipe.asks_for_data and options.bits is None:
        given = [name for name in ("samples", "length", "resume", "spill") if getattr(options, name) is not None]
        if given:
            raise RecipeError(f"--{given[0]} belongs to calibration: name a text with --calibration as well")
        return None
    if options.imatrix is not None:
        raise RecipeError(
            "--imatrix takes the place of a text: leave out --calibration, --bits, --scaler and algorithms that need one"
        )
    texts = tuple(options.calibration or ("default",))
    samples = options.samples or getattr(recipe.rounder_options, "samples", SAMPLES)
    length = options.length or LENGTH
    return Calibrating(texts, samples, length, options.resume, options.spill, options.bits)


def quantize_and_save(
    source: Source,
    out: Path,
    load: LoadOptions,
    output: Output,
    threads: int | None = None,
    compact: bool = False,
    calibrating: Calibrating | None = None,
) -> Report:
    """Load a model low-bit, save it, return the report."""
    from lowbit.cli.engines import start_torch

    start_torch(threads)
    from lowbit.cli.session import load_model, load_tokenizer

    needs_tokenizer = source.kind != "gguf" or calibrating is not None
    tokenizer = load_tokenizer(source, load) if needs_tokenizer else None
    model = load_model(source, load) if calibrating is None else _calibrated(source, load, tokenizer, calibrating)
    if tokenizer is None and source.kind != "gguf":
        output.note("lowbit: the source has no tokenizer, so none is saved")
    # A GGUF file's is written by the save itself.
    model.save_low_bit(out, tokenizer=None if source.kind == "gguf" else tokenizer, compact=compact)
    report: Report = model.lowbit_report
    return report


def _calibrated(source: Source, load: LoadOptions, tokenizer: Any, calibrating: Calibrating) -> Any:
    """The model block by block; in full precision first where bits are allocated, which takes gradients of the whole."""
    from lowbit.cli.session import load_model, refuse_low_bit

    assert load.recipe is not None
    refuse_low_bit(source)
    calibration = _tokens_for(source, tokenizer, calibrating)
    where: dict[str, Any] = {"resume": calibrating.resume, "spill": calibrating.spill}
    if calibrating.bits is None:
        return load_model(source, load, calibration=calibration, **where)
    from lowbit.optimize import optimize_model
    from lowbit.quantize import allocate_bits

    model = load_model(source, replace(load, recipe=None))
    recipe = allocate_bits(model, load.recipe, calibration, calibrating.bits)
    used = calibration if recipe.uses_data else None
    return optimize_model(model, None, recipe=recipe, calibration=used, **where)


def _tokens_for(source: Source, tokenizer: Any, calibrating: Calibrating) -> Calibration:
    """The windows, shared evenly among the texts."""
    from lowbit.calibration import OWN_TEXT, calibration_from, joined, own_text

    if tokenizer is None and any(text != OWN_TEXT for text in calibrating.texts):
        raise RecipeError(
            f"{source.name} has no tokenizer, which a calibration text is cut with: put the files of its tokenizer beside it"
        )
    count = len(calibrating.texts)
    parts = []
    for number, text in enumerate(calibrating.texts):
        samples = (calibrating.samples + number) // count
        if text == OWN_TEXT and source.kind == "hub":
            raise RecipeError("the text 'own' is written by a model on this machine: download it, and name its folder")
        if text == OWN_TEXT:
            parts.append(own_text(source.path, samples, calibrating.length))
        else:
            parts.append(calibration_from(text, tokenizer, samples, calibrating.length))
    return joined(parts)


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
    rounder, scaler = options.rounder or recipe.rounder, options.scaler or recipe.scaler
    changes |= {"rounder": rounder, "scaler": scaler}
    if options.algorithm_option:
        changes["rounder_options"] = parse_options("algorithm", rounder, options.algorithm_option, ROUNDER_OPTIONS)
    if options.scaler_option:
        changes["scaler_options"] = parse_options("scaler", scaler, options.scaler_option, SCALER_OPTIONS)
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
    if out.absolute().is_mount():  # of "." alone Python says that it is one
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


def check_beside(out: Path, **folders: Path | None) -> None:
    """Refuse folders of a calibration that lie inside OUT, which is replaced as a whole at the end."""
    for option, folder in folders.items():
        if folder is not None and folder.absolute().is_relative_to(out.absolute()):
            raise LowbitError(
                f"--{option} {folder} lies in {out}, where only the model will be: name a folder beside it"
            )


def folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
