"""One HTML page that compares recipes: two plots and the tables behind them, in a single file without scripts.

The plots are SVG inside the page, so that it can be mailed, committed, and read offline; every point has its name as a
tooltip. It is well-formed XML as well as HTML, which is how the tests read it. Colours are told apart by people who do
not see all of them (Okabe and Ito's eight), and the page follows the reader's dark mode.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from xml.sax.saxutils import escape, quoteattr

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#b8a900")
_WIDTH, _HEIGHT = 960, 380
_LEFT, _RIGHT, _TOP, _BOTTOM = 80, 20, 16, 52
_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1000px; margin: 2em auto; padding: 0 1em; }
svg { width: 100%; height: auto; } svg text { font-size: 12px; fill: currentColor; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
td, th { padding: 0.15em 0.8em; text-align: right; border-bottom: 1px solid #8884; }
td:first-child, th:first-child { text-align: left; }
.axis { stroke: currentColor; } .line { stroke: #8884; } .mark { font-weight: bold; }
"""
# What a drawing needs that lies in no page.
_ALONE = """
svg { color: #222; } @media (prefers-color-scheme: dark) { svg { color: #ddd; } }
text { font: 12px system-ui, sans-serif; fill: currentColor; } .axis { stroke: currentColor; } .line { stroke: #8884; }
"""
_LEGEND_LINE = 16


@dataclass(frozen=True)
class Point:
    """A place in a plot, and the name that a reader sees beside the pointer."""

    x: float
    y: float
    name: str


@dataclass(frozen=True)
class Series:
    """Points of one colour, joined by a line if asked for; `labelled` writes their names beside them."""

    name: str
    points: Sequence[Point]
    joined: bool = True
    labelled: bool = False


@dataclass(frozen=True)
class Plot:
    """A plot of series. `steps` are values of x with words for them, instead of numbers; `level` a line across.

    `logarithmic`: y, which is above 0 then, goes up by factors.
    """

    title: str
    x: str
    y: str
    series: Sequence[Series]
    steps: Sequence[tuple[float, str]] = ()
    level: tuple[float, str] | None = None
    logarithmic: bool = False


@dataclass(frozen=True)
class Table:
    title: str
    headers: Sequence[str]
    rows: Sequence[Sequence[str]] = field(default_factory=tuple)


def html_page(title: str, remarks: Iterable[str], parts: Iterable[Plot | Table]) -> str:
    """The whole page."""
    body = [f"<h1>{escape(title)}</h1>", *(f"<p>{escape(remark)}</p>" for remark in remarks)]
    for part in parts:
        body.append(f"<h2>{escape(part.title)}</h2>")
        body.append(_svg(part) if isinstance(part, Plot) else _table(part))
    head = f'<meta charset="utf-8"/><title>{escape(title)}</title><style>{_STYLE}</style>'
    return (
        '<!DOCTYPE html>\n<html xmlns="http://www.w3.org/1999/xhtml" lang="en">\n'
        f"<head>{head}</head>\n<body>\n" + "\n".join(body) + "\n</body>\n</html>\n"
    )


def svg_of(plot: Plot) -> str:
    """A plot as a file of its own, its legend inside."""
    marks = []
    for number, one in enumerate(plot.series):
        x, y, colour = _WIDTH - _RIGHT - 190, _TOP + _LEGEND_LINE * (number + 0.5), _COLOURS[number % len(_COLOURS)]
        marks.append(f'<circle cx="{x}" cy="{y - 4:.1f}" r="4" fill="{colour}"/>')
        marks.append(_text(x + 10, y, one.name, "start"))
    return _drawing(plot, [f"<style>{_ALONE}</style>", *marks])


def _table(table: Table) -> str:
    head = "".join(f"<th>{escape(text)}</th>" for text in table.headers)
    rows = ("<tr>" + "".join(f"<td>{escape(text)}</td>" for text in row) + "</tr>" for row in table.rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>\n" + "\n".join(rows) + "\n</tbody></table>"


class _Scale:
    """From values to places on the page."""

    def __init__(self, values: Sequence[float], first: float, last: float, from_zero: bool) -> None:
        low, high = (min(values), max(values)) if values else (0.0, 1.0)
        if from_zero:
            low = min(low, 0.0)
        margin = (high - low or abs(high) or 1.0) * 0.05
        self.low, self.high = (low if from_zero and low == 0 else low - margin), high + margin
        self.first, self.last = first, last

    def __call__(self, value: float) -> float:
        return self.first + (value - self.low) / (self.high - self.low) * (self.last - self.first)

    def ticks(self) -> list[float]:
        """Round numbers, four to nine of them."""
        step = 10.0 ** math.floor(math.log10((self.high - self.low) / 4))
        step *= next(factor for factor in (5, 2, 1) if (self.high - self.low) / (step * factor) >= 4)
        first = math.ceil(self.low / step)
        return [i * step for i in range(first, math.floor(self.high / step) + 1)]


class _LogScale(_Scale):
    """The same by factors, for values above 0."""

    def __init__(self, values: Sequence[float], first: float, last: float) -> None:
        super().__init__([math.log10(value) for value in values], first, last, from_zero=False)

    def __call__(self, value: float) -> float:
        return super().__call__(math.log10(value))

    def ticks(self) -> list[float]:
        """One, two and five times the powers of ten."""
        powers = range(math.floor(self.low), math.ceil(self.high) + 1)
        values = [digit * 10.0**power for power in powers for digit in (1, 2, 5)]
        return [value for value in values if self.low <= math.log10(value) <= self.high]


def _svg(plot: Plot) -> str:
    """A plot inside a page, its legend below."""
    return _drawing(plot) + ("" if len(plot.series) < 2 else _legend(plot.series))


def _drawing(plot: Plot, more: Sequence[str] = ()) -> str:
    points = [point for series in plot.series for point in series.points]
    level = [] if plot.level is None else [plot.level[0]]
    across = _Scale([p.x for p in points], _LEFT, _WIDTH - _RIGHT, from_zero=False)
    heights = [p.y for p in points] + level
    upward = _Scale(heights, _HEIGHT - _BOTTOM, _TOP, from_zero=True)
    if plot.logarithmic:
        upward = _LogScale(heights, _HEIGHT - _BOTTOM, _TOP)
    parts = [*more, *_axes(plot, across, upward)]
    if plot.level is not None:
        y = upward(plot.level[0])
        parts.append(_line(_LEFT, y, _WIDTH - _RIGHT, y, 'class="axis" stroke-dasharray="6 4"'))
        parts.append(_text(_LEFT + 6, y - 5, plot.level[1], "start"))
    for number, series in enumerate(plot.series):
        parts += _drawn(series, _COLOURS[number % len(_COLOURS)], across, upward)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f"aria-label={quoteattr(plot.title)}>\n" + "\n".join(parts) + "\n</svg>"
    )


def _axes(plot: Plot, across: _Scale, upward: _Scale) -> Iterable[str]:
    floor = _HEIGHT - _BOTTOM
    for tick in upward.ticks():
        yield _line(_LEFT, upward(tick), _WIDTH - _RIGHT, upward(tick), 'class="line"')
        yield _text(_LEFT - 8, upward(tick) + 4, f"{tick:.4g}", "end")
    for tick, label in plot.steps or [(tick, f"{tick:.4g}") for tick in across.ticks()]:
        yield _line(across(tick), floor, across(tick), floor + 5, 'class="axis"')
        yield _text(across(tick), floor + 19, label, "middle")
    yield _line(_LEFT, floor, _WIDTH - _RIGHT, floor, 'class="axis"')
    yield _text((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 10, plot.x, "middle")
    turned = f'transform="rotate(-90 16 {_HEIGHT / 2:.0f})"'
    yield f'<text x="16" y="{_HEIGHT / 2:.0f}" text-anchor="middle" {turned}>{escape(plot.y)}</text>'


def _drawn(series: Series, colour: str, across: _Scale, upward: _Scale) -> Iterable[str]:
    places = [(across(point.x), upward(point.y)) for point in series.points]
    if series.joined and len(places) > 1:
        way = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        yield f'<polyline points="{way}" fill="none" stroke="{colour}" stroke-opacity="0.55"/>'
    for (x, y), point in zip(places, series.points, strict=True):
        radius = 5 if series.labelled else 3
        yield f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="{colour}"><title>{escape(point.name)}</title></circle>'
        if series.labelled:
            right = x < _WIDTH * 0.75
            yield _text(x + (9 if right else -9), y - 7, series.name, "start" if right else "end", colour)


def _legend(series: Iterable[Series]) -> str:
    marks = (
        f'<span style="color:{_COLOURS[i % len(_COLOURS)]}" class="mark">● </span>{escape(one.name)}'
        for i, one in enumerate(series)
    )
    return "<p>" + " &#160; ".join(marks) + "</p>"


def _line(x1: float, y1: float, x2: float, y2: float, looks: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" {looks}/>'


def _text(x: float, y: float, text: str, anchor: str, colour: str = "") -> str:
    looks = f' style="fill:{colour}"' if colour else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{looks}>{escape(text)}</text>'
