"""`lowbit compare`: several recipes of one model beside each other, as a table and as a page with plots."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowbit.cli.evaluate import (
    add_windows,
    choose_window,
    contexts_of,
    distance_facts,
    load_original,
    measure_distance,
    measure_perplexity,
    perplexity_facts,
    rows_of,
)
from lowbit.cli.generate import read_text
from lowbit.cli.options import LoadOptions, add_json, add_loading, path
from lowbit.cli.output import Output, size_text
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
  lowbit compare ./int4 ./int3 ./nf4 --text moby_dick.txt --windows 20    and perplexity by size
  lowbit compare ./int4 ./int3 --text moby_dick.txt --against ./SmolLM2-135M --page quality.html
  lowbit compare ./int4 ./int3 --json > quality.json                      the figures for a script"""
PAGE = Path("comparison.html")


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
    parser.add_argument("--text", type=path, metavar="FILE", help="a text in UTF-8")
    add_windows(parser)
    parser.add_argument("--against", metavar="ORIGINAL", help="a model to compare with: the one it was made from")
    parser.add_argument("--page", type=path, default=PAGE, metavar="FILE", help=f"the page to write (default: {PAGE})")
    add_loading(parser)
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    output = Output(options.json)
    if options.against and options.text is None:
        raise LowbitError("--against compares what both predict of a text: name one with --text")
    text = None if options.text is None else read_text(options.text)
    sources = [find_source(name) for name in options.folders]
    entries = [
        Entry(name, source, read_report(source), {})
        for name, source in zip(short_names(options.folders), sources, strict=True)
    ]
    original: dict[str, Any] = {}
    if text is not None:
        entries, original = measure(entries, text, options, output)
    options.page.write_text(page_of(entries, original, options), encoding="utf-8")
    output.table(*table_of(entries))
    output.say(f"\nwritten: {options.page}")
    output.result({"page": str(options.page), "models": [entry.facts() for entry in entries]} | original)
    return 0


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
    numbers = ["size", "bits/weight", "mean error", *shown]
    rows = []
    for entry in entries:
        report = entry.report
        errors = [layer.error for layer in report.layers if math.isfinite(layer.error)]
        mean = f"{sum(errors) / len(errors):.4f}" if errors else "-"
        first = [entry.name, report.recipe or "-", size_text(report.bytes_after), f"{report.bits_per_weight:.2f}", mean]
        rows.append(first + [text.format(entry.measured[key]) for key, text in shown.values()])
    return ["model", "recipe", *numbers], rows, numbers


def page_of(entries: list[Entry], original: dict[str, Any], options: argparse.Namespace) -> str:
    """The page: quality by size where it was measured, errors by layer, and the tables of both."""
    headers, rows, _ = table_of(entries)
    parts: list[Plot | Table] = [Table("Recipes", headers, rows)]
    remarks = ["The error of a weight is |w - w^| / |w|; sizes are those of all weights in memory."]
    if entries[0].measured:
        tokens, windows = entries[0].measured["tokens"], entries[0].measured["windows"]
        remarks.append(f"Measured on {tokens} tokens of {options.text.name} in {windows} windows.")
        if original:
            parts.append(quality_plot(entries, "kl", "mean KL to the original (nats per token)"))
        level = (original["against"]["perplexity"], "original") if original else None
        parts.append(quality_plot(entries, "perplexity", "perplexity", level))
    parts += [error_plot(entries), error_table(entries)]
    return html_page("Recipes compared: " + ", ".join(entry.name for entry in entries), remarks, parts)


def quality_plot(entries: list[Entry], key: str, label: str, level: tuple[float, str] | None = None) -> Plot:
    series = []
    for entry in entries:
        size, value = entry.report.bytes_after / 1e6, entry.measured[key]
        name = f"{entry.name}: {value:.5g} at {size:.1f} MB"
        if math.isfinite(value):
            series.append(Series(entry.name, [Point(size, value, name)], joined=False, labelled=True))
    return Plot(f"{label} by size", "size of the weights (MB)", label, series, level=level)


def error_plot(entries: list[Entry]) -> Plot:
    """The error of every weight in the order of the model, with the numbers of the layers below."""
    places = {name: place for place, name in enumerate(paths_of(entries))}
    series = [
        Series(entry.name, [_error_point(layer, places) for layer in entry.report.layers if math.isfinite(layer.error)])
        for entry in entries
    ]
    starts: dict[str, int] = {}
    for name, place in places.items():
        found = IN_LAYER.fullmatch(name)
        if found is not None:
            starts.setdefault(found["index"], place)
    every = max(len(starts) // 16, 1)
    steps = [(float(place), index) for i, (index, place) in enumerate(starts.items()) if i % every == 0]
    return Plot("Error by layer", "layer", "relative error of a weight", series, steps)


def _error_point(layer: LayerReport, places: dict[str, int]) -> Point:
    return Point(places[layer.path], layer.error, f"{layer.path}: {layer.error:.4f} ({layer.format})")


def error_table(entries: list[Entry]) -> Table:
    rows = []
    by_path = [{layer.path: layer for layer in entry.report.layers} for entry in entries]
    for name in paths_of(entries):
        cells = [f"{found[name].error:.4f} {found[name].format}" if name in found else "-" for found in by_path]
        rows.append([name, *cells])
    return Table("Every weight", ["weight", *(entry.name for entry in entries)], rows)


def paths_of(entries: list[Entry]) -> list[str]:
    """The packed weights of all recipes, in the order of the model that has the most."""
    longest = sorted(entries, key=lambda entry: len(entry.report.layers), reverse=True)
    return list(dict.fromkeys(layer.path for entry in longest for layer in entry.report.layers))
