"""The report of a quantisation, for people: sizes, errors, what was left and why, kernels."""

from __future__ import annotations

from collections import Counter

from lowbit.cli.output import Output, seconds_text, size_text
from lowbit.report import LayerReport, Report

WORST_SHOWN = 8
SKIPPED_SHOWN = 12
_HEADERS = ("weight", "format", "shape", "bits/weight", "error", "size", "kernel")
_RIGHT = ("bits/weight", "error", "size")


def print_report(output: Output, report: Report, everything: bool = False) -> None:
    """Totals, the weights that rounding hurt most (or all), what was left, the kernels."""
    print_totals(output, report)
    output.say()
    rows = report.layers if everything else report.worst[:WORST_SHOWN]
    if not everything and len(report.layers) > len(rows):
        output.say(f"the {len(rows)} of {len(report.layers)} weights that rounding hurt most (--all shows all):")
    output.table(_HEADERS, [_row(layer) for layer in rows], right=_RIGHT)
    notes = [layer for layer in report.layers if layer.note]
    for layer in notes if everything else notes[:SKIPPED_SHOWN]:
        output.say(f"note: {layer.path}: {layer.note}")
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
