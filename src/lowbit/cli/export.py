"""`lowbit export openvino`: a model as a folder that OpenVINO and its own pipelines run, compared with its source."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from lowbit.cli.options import COUNT, LEAVE, add_json, number, path
from lowbit.cli.output import Output, size_text
from lowbit.cli.quantize import check_target, folder_bytes
from lowbit.cli.source import find_source
from lowbit.errors import RecipeError
from lowbit.formats import PER_CHANNEL

if TYPE_CHECKING:
    from lowbit.openvino.comparison import Row, Verification
    from lowbit.openvino.export import Written

DESCRIPTION = """\
Write a model in another program's form. Today: openvino, a folder for openvino_genai.LLMPipeline, for OVModelForCausalLM and
for every device that OpenVINO runs on.

MODEL is a Hugging Face folder, plain or low-bit (lowbit, compressed-tensors, GPTQ, AWQ), a .gguf file, or a name on the hub.
Codes that are there already arrive unrounded. Models above a billion weights are written in 8 bits unless a format is named.
What was written is compared with its source on every device that is here: logits, and 32 tokens."""
EXAMPLES = """\
  lowbit export openvino --model ./SmolLM2-135M --int4 ./ov              4 bits in groups of 128, head and embedding in 8
  lowbit export openvino --model ./model --int4 --ratio 0.8 ./ov         a fifth in 8 bits: those whose rounding hurts most
  lowbit export openvino --model ./model-gptq ./ov                       GPTQ's codes as they are
  lowbit export openvino --model model-q4_k_m.gguf ./ov --no-verify      a GGUF file's blocks as they are
  lowbit export openvino --model ./model --format nf4 ./ov               any format of lowbit's"""
_HEADERS = ("device", "setting", "difference", "divergence", "tokens alike", "")


def _group(text: str) -> int:
    return PER_CHANNEL if text == str(PER_CHANNEL) else int(COUNT(text))


_RATE = number(float, 0, 1, "a number from 0 to 1")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", metavar="openvino", choices=("openvino",), help="the form to write")
    parser.add_argument("out", metavar="OUT", type=path, help="the folder to write")
    parser.add_argument("-m", "--model", required=True, metavar="MODEL", help="folder, .gguf file, or name on the hub")
    group = parser.add_argument_group("format")
    chosen = group.add_mutually_exclusive_group()
    chosen.add_argument(
        "--int8", dest="format", action="store_const", const="int8", help="8 bits, a scale for each row"
    )
    chosen.add_argument("--int4", dest="format", action="store_const", const="int4", help="4 bits in groups of 128")
    chosen.add_argument("--format", metavar="F", help=f"any format of lowbit's, or '{LEAVE}': as the model is")
    group.add_argument("--group-size", type=_group, metavar="N", help="weights that share a scale; -1: a whole row")
    group.add_argument("--asym", action="store_true", help="with zero points")
    group.add_argument(
        "--ratio", type=_RATE, metavar="R", help="the share of weights in fewer than 8 bits (default: 1)"
    )
    check = parser.add_argument_group("comparison")
    check.add_argument(
        "--verify", action=argparse.BooleanOptionalAction, default=True, help="compare with the source (default: yes)"
    )
    check.add_argument(
        "--device", action="append", metavar="D", help="compare on this one (may be repeated; default: all)"
    )
    parser.add_argument("--force", action="store_true", help="replace OUT if it is a model that lowbit wrote")
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    output = Output(options.json)
    source = find_source(options.model)
    check_target(options.out, source, options.force)
    format = format_from(options.format, options.group_size, options.asym)
    from lowbit.openvino.export import write_decoder
    from lowbit.openvino.library import device

    for name in options.device or ():
        device(name)  # one that is not there is said before the work
    written = write_decoder(
        source.name,
        options.out,
        format,
        ratio=options.ratio,
        large_in_8_bits=options.format != LEAVE,
        keep=options.verify,
    )
    print_written(output, written, options.out)
    found = None
    if options.verify:
        from lowbit.openvino.comparison import verify

        found = verify(written, options.device)
        print_verification(output, found)
    output.result(
        {
            "source": source.name,
            "out": str(options.out),
            "bytes_on_disk": folder_bytes(options.out),
            "notes": list(written.notes),
            "verification": None if found is None else [row.to_dict() for row in found.rows],
            "rounding": None if found is None else found.rounding,
        }
        | written.report.to_dict()
    )
    return 0 if found is None or found.passed else 1


def format_from(name: str | None, group_size: int | None, asym: bool) -> str | None:
    """The format that the arguments spell, in the grammar of its names."""
    if name in (None, LEAVE):
        if group_size is not None or asym:
            raise RecipeError("--group-size and --asym belong to a format: say --int4, or --format F")
        return None
    groups = "" if group_size is None else "_channel" if group_size == PER_CHANNEL else f"_g{group_size}"
    suffix = ("_asym" if asym else "") + groups
    return f"{name}{suffix}"


def print_written(output: Output, written: Written, out: Path) -> None:
    for note in written.notes:
        output.note(f"lowbit: {note}")
    formats = ", ".join(f"{count} weights {name}" for name, count in written.report.formats().items())
    left = len(written.report.skipped)
    output.say(f"{formats or 'no weight packed'}{f', {left} as they were' if left else ''}")
    output.say(f"written to {shlex.quote(str(out))}: {size_text(folder_bytes(out))}, {written.report.seconds:.0f} s")


def print_verification(output: Output, found: Verification) -> None:
    output.say("\nagainst the source, in lowbit's own engine:")
    output.table(_HEADERS, [_cells(row) for row in found.rows], right=_HEADERS[2:5])
    if found.rounding is not None:
        output.say(f"the rounding itself moves answers by a divergence of {found.rounding:.4f}")
    if not found.passed:
        output.note("lowbit: the folder does not answer as its source on every device: see the lines that failed")


def _cells(row: Row) -> tuple[str, ...]:
    verdict = "as the source" if row.passed else "FAILED"
    if row.error:
        return row.device, row.setting, "-", "-", "-", f"{verdict}: {row.error}"
    remark = " (a tie)" if row.tie else ""
    return (
        row.device,
        row.setting,
        f"{row.difference:.1e}",
        f"{row.divergence:.5f}",
        f"{row.same} of {row.tokens}",
        verdict + remark,
    )
