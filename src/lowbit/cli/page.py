"""One HTML page that compares recipes: plots and the tables behind them, in a single file without scripts.

The plots are SVG inside the page, so that it can be mailed, committed, and read offline; every point has its name as a
tooltip, and a label goes where it hides neither a point nor another label. The page is well-formed XML as well as HTML, which
is how the tests read it. Colours are told apart by people who do not see all of them (Okabe and Ito's eight), and the page
follows the reader's dark mode.
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
td { white-space: nowrap; } td:last-child { white-space: normal; } td:first-child, th:first-child { text-align: left; }
.axis { stroke: currentColor; } .line { stroke: #8884; } .mark { font-weight: bold; }
h2 { margin: 2em 0 0.3em; } .note { opacity: 0.75; margin: 0 0 0.6em; } .wide { overflow-x: auto; }
summary { font-size: 1.2em; font-weight: bold; margin: 1.5em 0 0.5em; cursor: pointer; }
"""
# What a drawing needs that lies in no page.
_ALONE = """
svg { color: #222; } @media (prefers-color-scheme: dark) { svg { color: #ddd; } }
text { font: 12px system-ui, sans-serif; fill: currentColor; } .axis { stroke: currentColor; } .line { stroke: #8884; }
"""
_LEGEND_LINE = 16


# The width of a letter of a label, and how far labels are moved aside and up or down to find room.
_LETTER, _LINE = 6.6, 14
_BESIDE, _MOVES = 9, (-7, 15, -21, 29, -35, 43, -49, 57, -63, 71)
_WORSE = 100.0


@dataclass(frozen=True)
class Point:
    """A place in a plot, and the name that a reader sees beside the pointer; `spread`: a bar of so much up and down."""

    x: float
    y: float
    name: str
    spread: float = 0.0


@dataclass(frozen=True)
class Series:
    """Points of one colour, joined by a line if asked for; `labelled` writes their names beside them.

    `way`: where the line goes instead, past points that are many and drawn small for it.
    """

    name: str
    points: Sequence[Point]
    joined: bool = True
    labelled: bool = False
    way: Sequence[tuple[float, float]] = ()


@dataclass(frozen=True)
class Plot:
    """A plot of series. `steps` are values of x with words for them, instead of numbers; `level` a line across.

    `logarithmic`: y, which is above 0 then, goes up by factors; `from_zero`: else it begins at 0.
    """

    title: str
    x: str
    y: str
    series: Sequence[Series]
    steps: Sequence[tuple[float, str]] = ()
    level: tuple[float, str] | None = None
    logarithmic: bool = False
    from_zero: bool = True
    note: str = ""


@dataclass(frozen=True)
class Table:
    """Rows under headers; `folded`: shown when its title is clicked."""

    title: str
    headers: Sequence[str]
    rows: Sequence[Sequence[str]] = field(default_factory=tuple)
    note: str = ""
    folded: bool = False


def html_page(title: str, remarks: Iterable[str], parts: Iterable[Plot | Table]) -> str:
    """The whole page."""
    body = [f"<h1>{escape(title)}</h1>", *(f"<p>{escape(remark)}</p>" for remark in remarks)]
    body += [_part(part) for part in parts]
    head = f'<meta charset="utf-8"/><title>{escape(title)}</title><style>{_STYLE}</style>'
    return (
        '<!DOCTYPE html>\n<html xmlns="http://www.w3.org/1999/xhtml" lang="en">\n'
        f"<head>{head}</head>\n<body>\n" + "\n".join(body) + "\n</body>\n</html>\n"
    )


def _part(part: Plot | Table) -> str:
    """A plot or a table under its title."""
    shown = _svg(part) if isinstance(part, Plot) else _table(part)
    note = f'<p class="note">{escape(part.note)}</p>' if part.note else ""
    if isinstance(part, Table) and part.folded:
        return f"<details><summary>{escape(part.title)} ({len(part.rows)})</summary>{note}{shown}</details>"
    return f"<h2>{escape(part.title)}</h2>{note}{shown}"


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
    filled = "\n".join(rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>\n{filled}\n</tbody></table></div>'


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
    heights = [height for p in points for height in _ends(p, plot.logarithmic)] + level
    upward = _Scale(heights, _HEIGHT - _BOTTOM, _TOP, plot.from_zero)
    if plot.logarithmic:
        upward = _LogScale(heights, _HEIGHT - _BOTTOM, _TOP)
    parts = [*more, *_axes(plot, across, upward)]
    if plot.level is not None:
        y = upward(plot.level[0])
        parts.append(_line(_LEFT, y, _WIDTH - _RIGHT, y, 'class="axis" stroke-dasharray="6 4"'))
        parts.append(_text(_LEFT + 6, y - 5, plot.level[1], "start"))
    for number, series in enumerate(plot.series):
        parts += _drawn(series, _COLOURS[number % len(_COLOURS)], across, upward, plot.logarithmic)
    parts += _labels(plot, across, upward)
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


def _drawn(series: Series, colour: str, across: _Scale, upward: _Scale, logarithmic: bool = False) -> Iterable[str]:
    places = [(across(point.x), upward(point.y)) for point in series.points]
    joined = [(across(x), upward(y)) for x, y in series.way] or (places if series.joined else [])
    if len(joined) > 1:
        way = " ".join(f"{x:.1f},{y:.1f}" for x, y in joined)
        looks = 'stroke-width="2"' if series.way else 'stroke-opacity="0.55"'
        yield f'<polyline points="{way}" fill="none" stroke="{colour}" {looks}/>'
    for (x, y), point in zip(places, series.points, strict=True):
        if point.spread:
            low, high = map(upward, _ends(point, logarithmic))
            yield _line(x, low, x, high, f'stroke="{colour}"')
        radius = "5" if series.labelled else "2" if series.way else "3"
        pale = ' fill-opacity="0.45"' if series.way else ""
        name = f"<title>{escape(point.name)}</title>"
        yield f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="{colour}"{pale}>{name}</circle>'


def _ends(point: Point, logarithmic: bool) -> tuple[float, float]:
    """Where the bar of a point begins and ends; where heights are factors, not below half of the point."""
    low = point.y - point.spread
    return (max(low, point.y / 2) if logarithmic else low), point.y + point.spread


_Box = tuple[float, float, float, float]  # left, top, right, bottom


def _labels(plot: Plot, across: _Scale, upward: _Scale) -> Iterable[str]:
    """The name of each labelled series beside its first point, where it covers least of what is there."""
    taken: list[_Box] = []
    series = plot.series
    if plot.level is not None:
        height, letters = upward(plot.level[0]), len(plot.level[1])
        taken += [(_LEFT, height - 2, _WIDTH, height + 2), (_LEFT, height - 16, _LEFT + letters * _LETTER, height)]
    for one in series:
        for point in one.points if any(s.labelled for s in series) else ():
            x, y = across(point.x), upward(point.y)
            taken.append((x - 6, y - 6, x + 6, y + 6))
    for number, one in enumerate(series):
        if not one.labelled or not one.points:
            continue
        x, y = across(one.points[0].x), upward(one.points[0].y)
        offers = [(side, move) for move in _MOVES for side in ("start", "end")]
        boxes = [_box(x, y + move, len(one.name), side) for side, move in offers]
        best = min(range(len(offers)), key=lambda i: sum(_covered(boxes[i], box) for box in taken) + _outside(boxes[i]))
        (side, move), colour = offers[best], _COLOURS[number % len(_COLOURS)]
        taken.append(boxes[best])
        yield _text(x + (_BESIDE if side == "start" else -_BESIDE), y + move, one.name, side, colour)


def _box(x: float, baseline: float, letters: int, side: str) -> _Box:
    """What a label covers."""
    width = letters * _LETTER
    left = x + _BESIDE if side == "start" else x - _BESIDE - width
    return left, baseline - _LINE * 0.8, left + width, baseline + _LINE * 0.2


def _covered(one: _Box, other: _Box) -> float:
    """How much two boxes share."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return width * height if width > 0 and height > 0 else 0.0


def _outside(box: _Box) -> float:
    """How much of a box lies outside the plot, which is worse than to cover something."""
    plot = (float(_LEFT), 0.0, float(_WIDTH), float(_HEIGHT - _BOTTOM))
    return _WORSE * ((box[2] - box[0]) * (box[3] - box[1]) - _covered(box, plot))


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
