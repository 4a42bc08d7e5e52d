"""The report of a quantisation, for people: sizes, errors, what was left and why, kernels."""

from __future__ import annotations

import re
from collections import Counter

from lowbit.cli.output import Output, seconds_text, size_text
from lowbit.report import LayerReport, Report

SKIPPED_SHOWN = 12
# Layers in one table of errors; longer models show their worst layers, in their order.
LAYERS_SHOWN = 48
# model.layers.7.self_attn.q_proj is the weight self_attn.q_proj of layer 7 of model.layers.
IN_LAYER = re.compile(r"(?P<stack>.*?)\.(?P<index>\d+)\.(?P<weight>.+)")
_HEADERS = ("weight", "format", "shape", "bits/weight", "error", "size", "kernel")
_RIGHT = ("bits/weight", "error", "size")


def print_report(output: Output, report: Report, everything: bool = False) -> None:
    """Totals, the error of every weight layer by layer (or a line for each weight), what was left, the kernels."""
    print_totals(output, report)
    output.say()
    if everything:
        output.table(_HEADERS, [_row(layer) for layer in report.layers], right=_RIGHT)
    else:
        print_errors(output, report)
    print_notes(output, report, everything)
    print_skipped(output, report, everything)


def print_totals(output: Output, report: Report) -> None:
    share = report.bytes_after / max(report.bytes_before, 1)
    formats = ", ".join(f"{name} x{count}" for name, count in report.formats().items())
    kernels = Counter(layer.kernel or "not chosen" for layer in report.layers)
    output.facts(
        [
            ("recipe", report.recipe or "-"),
            ("size", f"{size_text(report.bytes_before)} -> {size_text(report.bytes_after)} ({share:.0%})"),
            ("bits per weight", f"{report.bits_per_weight:.2f} over the packed weights"),
            ("packed", f"{len(report.layers)} weights: {formats}"),
            ("error", error_summary(report)),
            ("kernels", ", ".join(f"{name} x{count}" for name, count in kernels.most_common())),
            ("not packed", f"{len(report.skipped)} left; norms and biases {size_text(report.other_bytes)}"),
            ("time", seconds_text(report.seconds)),
        ]
    )


def error_summary(report: Report) -> str:
    """The mean and the largest relative error |w - w^| / |w| of the packed weights."""
    errors = [layer.error for layer in report.layers]
    if not errors:
        return "-"
    worst = report.worst[0]
    return f"{sum(errors) / len(errors):.4f} on average, {worst.error:.4f} at most ({worst.path})"


def print_errors(output: Output, report: Report) -> None:
    """The relative error of every weight: a line for each layer of a stack, a column for each of its weights."""
    stacks: dict[str, dict[int, dict[str, float]]] = {}
    alone: list[LayerReport] = []
    for row in report.layers:
        found = IN_LAYER.fullmatch(row.path)
        if found is None:
            alone.append(row)
        else:
            layers = stacks.setdefault(found["stack"], {})
            layers.setdefault(int(found["index"]), {})[found["weight"]] = row.error
    if alone:
        output.table(_HEADERS, [_row(layer) for layer in alone], right=_RIGHT)
    for stack, layers in stacks.items():
        weights = list(dict.fromkeys(name for errors in layers.values() for name in errors))
        worst = sorted(layers, key=lambda index: max(layers[index].values()), reverse=True)[:LAYERS_SHOWN]
        names = _short(weights)
        cells = [[str(i), *(f"{layers[i][w]:.4f}" if w in layers[i] else "-" for w in weights)] for i in sorted(worst)]
        cut = f", the {len(worst)} worst of {len(layers)} layers" if len(worst) < len(layers) else ""
        output.say(f"\nerrors in {stack}{cut} (lowbit quantize --all has a line for each weight):")
        output.table(("layer", *names), cells, right=("layer", *names))


def _short(weights: list[str]) -> list[str]:
    """Names of weights without the modules around them, where that leaves them apart."""
    short = [name.rpartition(".")[2] for name in weights]
    return short if len(set(short)) == len(short) else weights


def print_notes(output: Output, report: Report, everything: bool) -> None:
    """What is remarked of the packed weights; what is said of several is said once, unless everything is asked for."""
    if everything:
        for layer in report.layers:
            if layer.note:
                output.say(f"note: {layer.path}: {layer.note}")
        return
    paths: dict[str, list[str]] = {}
    for layer in report.layers:
        if layer.note:
            paths.setdefault(layer.note, []).append(layer.path)
    for note in list(paths)[:SKIPPED_SHOWN]:
        output.say(f"note: {_all_of(paths[note])}: {note}")
    if len(paths) > SKIPPED_SHOWN:
        output.say(f"note: {len(paths) - SKIPPED_SHOWN} more (--all shows them)")


def _all_of(paths: list[str]) -> str:
    """One path, or how many there are below what they share."""
    if len(paths) == 1:
        return paths[0]
    shared = []
    for parts in zip(*(path.split(".") for path in paths), strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return f"{len(paths)} weights of {'.'.join(shared) or 'the model'}"


def print_skipped(output: Output, report: Report, everything: bool) -> None:
    """Everything left as it was, with the reason."""
    shown = report.skipped if everything else report.skipped[:SKIPPED_SHOWN]
    for row in shown:
        output.say(f"left: {row.path} ({size_text(row.bytes)}): {row.reason}")
    if len(report.skipped) > len(shown):
        output.say(f"left: {len(report.skipped) - len(shown)} more (--all shows them)")


def _row(layer: LayerReport) -> list[str]:
    shape = "x".join(map(str, layer.shape))
    numbers = [f"{layer.bits_per_weight:.2f}", f"{layer.error:.4f}", size_text(layer.bytes_after)]
    return [layer.path, layer.format, shape, *numbers, layer.kernel or "-"]
