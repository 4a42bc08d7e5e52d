"""`lowbit compare`: several recipes of one model beside each other, as a table and as a page with plots."""

from __future__ import annotations

import argparse
import datetime
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lowbit
from lowbit.cli.evaluate import (
    add_text,
    choose_window,
    chosen_text,
    contexts_of,
    distance_facts,
    load_original,
    measure_distance,
    measure_perplexity,
    perplexity_facts,
    rows_of,
)
from lowbit.cli.options import LoadOptions, add_json, add_loading, path
from lowbit.cli.output import Output, seconds_text, size_text
from lowbit.cli.page import Plot, Point, Series, Table, html_page
from lowbit.cli.report import IN_LAYER
from lowbit.cli.source import Source, find_source
from lowbit.contents import REPORT, read_json
from lowbit.errors import CheckpointError, LowbitError
from lowbit.report import LayerReport, Report

if TYPE_CHECKING:
    from lowbit.cli.engines import AnySession

DESCRIPTION = """\
Set several low-bit folders of one model beside each other: sizes, the error of every weight, and, on a text, perplexity.
With --against, the distance from the original too.

Writes one HTML page with plots of the error by layer and of the quality by size; it needs no network and no script."""
EXAMPLES = """\
  lowbit compare ./small ./smaller                                        sizes and errors by layer
  lowbit compare ./int4 ./int3 ./nf4 --text moby_dick --windows 20    and perplexity by size
  lowbit compare ./int4 ./int3 --text moby_dick --against ./SmolLM2-135M --page quality.html
  lowbit compare ./int4 ./int3 --json > quality.json                      the figures for a script"""
PAGE = Path("comparison.html")
# Recipes further apart than this are told by factors.
_FAR = 6


@dataclass(frozen=True)
class Entry:
    """One folder: its name in the plots, its report, and what was measured on the text."""

    name: str
    folder: Source
    report: Report
    measured: dict[str, Any]

    def facts(self) -> dict[str, Any]:
        report = self.report.to_dict()
        kept = ("recipe", "bytes_before", "bytes_after", "bits_per_weight", "formats", "layers")
        return {"model": self.folder.name, "name": self.name} | {key: report[key] for key in kept} | self.measured


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folders", metavar="FOLDER", nargs="+", help="folders that lowbit quantize wrote")
    add_text(parser, "with --against")
    parser.add_argument("--against", metavar="ORIGINAL", help="a model to compare with: the one it was made from")
    parser.add_argument("--page", type=path, default=PAGE, metavar="FILE", help=f"the page to write (default: {PAGE})")
    add_loading(parser)
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    output = Output(options.json)
    check_page(options.page)
    text = chosen_text(options) if options.against or options.text is not None else None
    folders = list(dict.fromkeys(options.folders))
    sources = [find_source(name) for name in folders]
    entries = [
        Entry(name, source, read_report(source), {}) for name, source in zip(short_names(folders), sources, strict=True)
    ]
    original: dict[str, Any] = {}
    if text is not None:
        entries, original = measure(entries, text, options, output)
    output.table(*table_of(entries))
    write_page(options.page, page_of(entries, original, options))
    output.say(f"\nwritten: {options.page}")
    output.result({"page": str(options.page), "models": [entry.facts() for entry in entries]} | original)
    return 0


def check_page(page: Path) -> None:
    """Refuse, before anything is measured, to write a page where none can be."""
    folder = page.resolve().parent
    if page.is_dir():
        raise LowbitError(f"{page} is a folder: name a file for the page, {page / PAGE}")
    if not is_stream(page) and not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise LowbitError(f"{page} cannot be written: {folder} is no folder that you may write to")
    if page.exists() and not os.access(page, os.W_OK):
        raise LowbitError(f"{page} is read-only for you: name another page")


def is_stream(page: Path) -> bool:
    """A pipe or a device (/dev/stdout, /dev/null), into which is written: a file in its place would take it from others."""
    return page.exists() and not page.is_file()


def write_page(page: Path, content: str) -> None:
    """The whole page or nothing: one that lies there already stays until then, and so does a link to it."""
    target = page.resolve()
    temporary = target.with_name(f".{target.name}.part")
    try:
        if is_stream(page):
            page.write_text(content, encoding="utf-8")
            return
        temporary.write_text(content, encoding="utf-8")
        temporary.replace(target)
    except OSError as error:
        raise LowbitError(f"{page} was not written: {error.strerror or error}") from None
    finally:
        temporary.unlink(missing_ok=True)


def read_report(source: Source) -> Report:
    """The report that was saved with a low-bit model."""
    file = source.path / REPORT
    if source.kind != "folder" or not file.is_file():
        raise CheckpointError(f"{source.name} has no {REPORT}: compare folders that lowbit quantize wrote")
    report = Report.from_dict(read_json(file))
    if not report.layers:
        raise CheckpointError(f"{file} names no packed weight: compare folders that lowbit quantize wrote")
    return report


def short_names(folders: list[str]) -> list[str]:
    """The names of folders, or their paths where two have the same name."""
    names = [Path(folder).resolve().name for folder in folders]
    return names if len(set(names)) == len(names) else folders


def measure(
    entries: list[Entry], text: str, options: argparse.Namespace, output: Output
) -> tuple[list[Entry], dict[str, Any]]:
    """Each model on the same tokens, one in memory at a time beside the original; and what the original gives."""
    load = LoadOptions(None, options.dtype, options.device, options.allow_pickle, options.trust_remote_code)
    source = find_source(options.against) if options.against else None
    other, rows, found, facts = None, None, [], {}
    from lowbit.cli.engines import open_session

    for entry in entries:
        session = open_session(entry.folder, load, options.threads)
        if source is not None and other is None:
            other = load_original(session, source, load, entry.name, options.threads)
        own = tokens_of(session, other, text, options, output)
        if rows is not None and own != rows:
            raise LowbitError(
                f"{entry.name} reads the text as other tokens than {entries[0].name}: compare recipes of one model"
            )
        rows = own
        if other is None:
            found.append(
                Entry(entry.name, entry.folder, entry.report, perplexity_facts(measure_perplexity(session, rows)))
            )
            continue
        distance = measure_distance(session, other, rows)
        against = distance_facts(distance, options.against)
        facts = {"against": {key: against[key] for key in ("model", "perplexity")}}
        measured = perplexity_facts(distance.perplexity) | {
            key: against[key] for key in ("kl", "kl_standard_error", "top1")
        }
        found.append(Entry(entry.name, entry.folder, entry.report, measured))
    return found, facts


def tokens_of(
    session: AnySession, other: Any | None, text: str, options: argparse.Namespace, output: Output
) -> list[list[int]]:
    """The text in windows that both models read."""
    window = choose_window(options.window, contexts_of(session, other), output)
    return rows_of(session.plain_tokens(text), window, options)


def table_of(entries: list[Entry]) -> tuple[list[str], list[list[str]], list[str]]:
    """Headers, rows, and which columns are numbers."""
    columns = {
        "perplexity": ("perplexity", "{:.4f}"),
        "KL": ("kl", "{:.5f}"),
        "+-": ("kl_standard_error", "{:.5f}"),
        "same token": ("top1", "{:.2%}"),
    }
    shown = {head: row for head, row in columns.items() if row[0] in entries[0].measured}
    numbers = ["size", "bits/weight", "mean error", "made in", *shown]
    rows = []
    for entry in entries:
        report = entry.report
        errors = [layer.error for layer in report.layers if math.isfinite(layer.error)]
        mean = f"{sum(errors) / len(errors):.4f}" if errors else "-"
        first = [entry.name, report.recipe or "-", size_text(report.bytes_after), f"{report.bits_per_weight:.2f}", mean]
        first.append(seconds_text(report.seconds))
        rows.append(first + [text.format(entry.measured[key]) for key, text in shown.values()])
    return ["model", "recipe", *numbers], rows, numbers


def page_of(entries: list[Entry], original: dict[str, Any], options: argparse.Namespace) -> str:
    """The page: quality by size where it was measured, errors by layer and by kind, and the tables behind them."""
    headers, rows, _ = table_of(entries)
    parts: list[Plot | Table] = [Table("Recipes", headers, rows)]
    remarks = [
        "The error of a weight is |w - w^| / |w|; the size is that of all weights in memory, and bits per weight are those of "
        "the packed ones, scales included."
    ]
    if entries[0].measured:
        remarks.append(_measured_on(entries, original, options))
        if original:
            parts.append(quality_plot(entries, "kl", "mean KL to the original (nats per token)"))
        level = (original["against"]["perplexity"], "original") if original else None
        parts.append(quality_plot(entries, "perplexity", "perplexity", level))
    parts += [error_plot(entries), kind_table(entries), error_table(entries)]
    parts += [table for table in (remark_table(entries), left_table(entries)) if table.rows]
    remarks.append(f"lowbit {lowbit.__version__}, {datetime.date.today().isoformat()}.")
    return html_page("Recipes compared: " + ", ".join(entry.name for entry in entries), remarks, parts)


def _measured_on(entries: list[Entry], original: dict[str, Any], options: argparse.Namespace) -> str:
    tokens, windows = entries[0].measured["tokens"], entries[0].measured["windows"]
    said = f"Measured on {tokens} tokens of {options.text.name} in {windows} windows"
    if not original:
        return f"{said}."
    against = original["against"]
    return f"{said}; the original is {against['model']}, of perplexity {against['perplexity']:.4f}."


def quality_plot(entries: list[Entry], key: str, label: str, level: tuple[float, str] | None = None) -> Plot:
    """A point for each recipe, with the standard error where it was measured; by factors where they are far apart."""
    series = []
    for entry in entries:
        size, value = entry.report.bytes_after / 1e6, entry.measured[key]
        error = (
            entry.measured.get("kl_standard_error", 0.0)
            if key == "kl"
            else value * entry.measured["nll_standard_error"]
        )
        name = f"{entry.name}: {value:.5g} +- {error:.2g} at {size:.1f} MB"
        if math.isfinite(value):
            spread = error if key == "kl" else 0.0
            series.append(Series(entry.name, [Point(size, value, name, spread)], joined=False, labelled=True))
    heights = [one.points[0].y for one in series] + ([] if level is None else [level[0]])
    far = bool(heights) and min(heights) > 0 and max(heights) > _FAR * min(heights)
    return Plot(
        f"{label} by size",
        "size of the weights (MB)",
        label,
        series,
        level=level,
        logarithmic=far,
        from_zero=level is None,
    )


def error_plot(entries: list[Entry]) -> Plot:
    """The error of every weight in the order of the model, and a line through the means of its layers."""
    places = {name: place for place, name in enumerate(paths_of(entries))}
    layers: dict[tuple[str, str], list[int]] = {}
    for name, place in places.items():
        found = IN_LAYER.fullmatch(name)
        if found is not None:
            layers.setdefault((found["stack"], found["index"]), []).append(place)
    series = [
        Series(
            entry.name,
            [_error_point(layer, places) for layer in entry.report.layers if math.isfinite(layer.error)],
            way=_way_of(entry, places, layers),
        )
        for entry in entries
    ]
    every = max(len(layers) // 16, 1)
    steps = [(_mean(found), index) for i, ((_, index), found) in enumerate(layers.items()) if i % every == 0]
    note = "Dots are weights, a line goes through the mean of each layer."
    return Plot("Error by layer", "layer", "relative error of a weight", series, steps, note=note if layers else "")


def _way_of(
    entry: Entry, places: dict[str, int], layers: dict[tuple[str, str], list[int]]
) -> list[tuple[float, float]]:
    """The middle of each layer, and the mean error of its weights."""
    errors = {places[layer.path]: layer.error for layer in entry.report.layers if math.isfinite(layer.error)}
    held = [(found, [errors[place] for place in found if place in errors]) for found in layers.values()]
    return [(_mean(found), _mean(own)) for found, own in held if own]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _error_point(layer: LayerReport, places: dict[str, int]) -> Point:
    return Point(places[layer.path], layer.error, f"{layer.path}: {layer.error:.4f} ({layer.format})")


def kind_table(entries: list[Entry]) -> Table:
    """The mean error of the weights of one name in all layers, and of those outside them."""
    columns = []
    for entry in entries:
        errors: dict[str, list[float]] = {}
        for layer in entry.report.layers:
            if math.isfinite(layer.error):
                errors.setdefault(_kind_of(layer.path), []).append(layer.error)
        columns.append(errors)
    kinds = list(dict.fromkeys(_kind_of(path) for path in paths_of(entries)))
    rows = [[kind, *(f"{_mean(column[kind]):.4f}" if kind in column else "-" for column in columns)] for kind in kinds]
    return Table("Mean error by kind of weight", ["weight", *(entry.name for entry in entries)], rows)


def _kind_of(path: str) -> str:
    found = IN_LAYER.fullmatch(path)
    return path if found is None else found["weight"]


def error_table(entries: list[Entry]) -> Table:
    rows = []
    by_path = [{layer.path: layer for layer in entry.report.layers} for entry in entries]
    for name in paths_of(entries):
        cells = [f"{found[name].error:.4f} {found[name].format}" if name in found else "-" for found in by_path]
        rows.append([name, *cells])
    return Table("Every weight", ["weight", *(entry.name for entry in entries)], rows, folded=True)


def remark_table(entries: list[Entry]) -> Table:
    """What was said of weights that were packed."""
    rows = [[layer.path, entry.name, layer.note] for entry in entries for layer in entry.report.layers if layer.note]
    return Table("Remarks of the reports", ["weight", "model", "remark"], rows, folded=True)


def left_table(entries: list[Entry]) -> Table:
    """What was left as it was, and why."""
    rows = [
        [left.path, entry.name, size_text(left.bytes), left.reason]
        for entry in entries
        for left in entry.report.skipped
    ]
    return Table("Left as it was", ["weight", "model", "size", "reason"], rows, folded=True)


def paths_of(entries: list[Entry]) -> list[str]:
    """The packed weights of all recipes, in the order of the model that has the most."""
    longest = sorted(entries, key=lambda entry: len(entry.report.layers), reverse=True)
    return list(dict.fromkeys(layer.path for entry in longest for layer in entry.report.layers))
