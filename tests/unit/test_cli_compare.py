"""`lowbit compare`: the figures of each recipe, and a page that is whole, offline and names every weight."""

from __future__ import annotations

import itertools
import json
import os
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from lowbit.cli import FAILED, OK, main
from lowbit.cli.page import Plot, Point, Series, Table, html_page, svg_of
from lowbit_assets import tiny_model
from unit.checkpoint_cases import small_files

SVG, HTML = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xhtml}"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model, two recipes of it, and a text."""
    home = tmp_path_factory.mktemp("home")
    dense = str(tiny_model("llama", home / "dense"))
    assert main(["quantize", dense, str(home / "four"), "--format", "int4_g32"]) == OK
    assert main(["quantize", dense, str(home / "three"), "--format", "int3_g32", "--skip", "lm_head"]) == OK
    (home / "text.txt").write_text("Call me Ishmael. Some years ago, never mind how long precisely. " * 4)
    return home


def compare(home: Path, capsys: pytest.CaptureFixture[str], *more: str) -> tuple[dict, ElementTree.Element]:
    page = home / "page.html"
    capsys.readouterr()
    assert main(["compare", str(home / "four"), str(home / "three"), "--page", str(page), "--json", *more]) == OK
    return json.loads(capsys.readouterr().out), ElementTree.fromstring(page.read_text(encoding="utf-8"))


def words_of(page: ElementTree.Element) -> str:
    return "\n".join(page.itertext())


def test_a_page_of_reports_alone_names_every_weight(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found, page = compare(home, capsys)
    assert [model["name"] for model in found["models"]] == ["four", "three"]
    assert found["models"][0]["bytes_after"] > 0 and "perplexity" not in found["models"][0]
    plots = page.findall(f".//{SVG}svg")
    assert len(plots) == 1
    titles = [title.text or "" for title in plots[0].iter(f"{SVG}title")]
    for model in found["models"]:
        for layer in model["layers"]:
            assert f"{layer['path']}: {layer['error']:.4f} ({layer['format']})" in titles
            assert layer["path"] in words_of(page)
    assert len(titles) == sum(len(model["layers"]) for model in found["models"]) == 15 + 14


def test_quality_by_size(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--text", str(home / "text.txt"), "--window", "32", "--against", str(home / "dense")]
    found, page = compare(home, capsys, *options)
    four, three = found["models"]
    assert four["kl"] < three["kl"] and four["kl_standard_error"] > 0 and 0 < three["top1"] < 1
    assert found["against"]["perplexity"] > 1
    plots = page.findall(f".//{SVG}svg")
    assert [plot.get("aria-label") for plot in plots] == [
        "mean KL to the original (nats per token) by size",
        "perplexity by size",
        "Error by layer",
    ]
    assert len(plots[0].findall(f"{SVG}circle")) == 2
    said = f"four: {four['kl']:.5g} +- {four['kl_standard_error']:.2g} at {four['bytes_after'] / 1e6:.1f} MB"
    assert said in words_of(page) and f"in {four['windows']} windows; the original is" in words_of(page)


def test_without_a_text_the_one_that_comes_along_is_taken(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found, page = compare(home, capsys, "--against", str(home / "dense"), "--window", "64", "--windows", "2")
    assert "126 tokens of sqlite_valid in 2 windows" in words_of(page)
    assert all(model["kl"] > 0 for model in found["models"])


def test_errors_by_kind_and_what_the_reports_say(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found, page = compare(home, capsys)
    rows = {row[0].text: [cell.text for cell in row] for row in page.iter(f"{HTML}tr") if len(row) == 3}
    three = found["models"][1]["layers"]
    errors = [layer["error"] for layer in three if layer["path"].endswith("mlp.up_proj")]
    assert rows["mlp.up_proj"][2] == f"{sum(errors) / len(errors):.4f}" and rows["lm_head"][2] == "-"
    folded = [part.find(f"{HTML}summary") for part in page.iter(f"{HTML}details")]
    titles = [title.text for title in folded if title is not None]
    assert titles[0] == "Every weight (15)" and titles[-1] == "Left as it was (3)"
    assert "named in modules_to_not_convert (lm_head)" in words_of(page)
    lines = page.findall(f".//{SVG}polyline")
    assert [len(line.get("points", "").split()) for line in lines] == [
        2,
        2,
    ]  # a line goes through the means of two layers


def test_a_table_for_people(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["compare", str(home / "four"), str(home / "three"), "--page", str(home / "other.html")]
    assert main([*words, "--text", str(home / "text.txt"), "--window", "32", "--windows", "2"]) == OK
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:2] == ["model", "recipe"] and "perplexity" in lines[0]
    assert [line.split()[0] for line in lines[1:3]] == ["four", "three"] and lines[
        -1
    ] == f"written: {home / 'other.html'}"


def test_the_page_needs_no_network(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compare(home, capsys)

    class Reader(HTMLParser):
        tags: set[str] = set()
        links: list[str] = []

        def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
            self.tags.add(tag)
            self.links += [value or "" for name, value in attributes if name in ("src", "href")]

    reader = Reader()
    reader.feed((home / "page.html").read_text(encoding="utf-8"))
    assert reader.links == [] and not {"script", "link", "img", "iframe"} & reader.tags


def test_what_cannot_be_compared(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, said in (
        ([str(home / "dense")], "has no lowbit_report.json: compare folders that lowbit quantize wrote"),
        ([str(tmp_path / "absent")], "absent"),
    ):
        assert main(["compare", *words, "--page", str(tmp_path / "page.html")]) == FAILED
        assert said in capsys.readouterr().err
    assert not (tmp_path / "page.html").exists()


def test_a_page_that_cannot_be_written_is_told_before_anything_is_measured(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    for page, said in ((tmp_path, "is a folder: name a file for the page"), (tmp_path / "no" / "p.html", "no folder")):
        # What would be measured is not there either, and nobody has looked for it yet.
        words = ["compare", str(home / "four"), "--against", str(tmp_path / "absent"), "--page", str(page)]
        assert main(words) == FAILED
        assert said in capsys.readouterr().err


def test_a_page_for_which_there_is_no_room_leaves_the_one_before_and_the_table(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.html"
    page.write_text("before")
    with small_files(5000):  # the page needs more
        assert main(["compare", str(home / "four"), str(home / "three"), "--page", str(page)]) == FAILED
    captured = capsys.readouterr()
    assert f"{page} was not written: File too large" in captured.err and "three" in captured.out
    assert [file.name for file in tmp_path.iterdir()] == ["page.html"] and page.read_text() == "before"


def test_a_pipe_or_a_link_in_the_place_of_a_page_stays_one(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe, link, page = (tmp_path / name for name in ("pipe", "link.html", "page.html"))
    os.mkfifo(pipe)
    link.symlink_to(page)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        for named in (pipe, link):
            assert main(["compare", str(home / "four"), "--page", str(named)]) == OK
        held = os.read(reader, 1 << 16)
    finally:
        os.close(reader)
    assert b"</html>" in held and pipe.is_fifo()
    assert link.is_symlink() and "</html>" in page.read_text()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["link.html", "page.html", "pipe"]
    capsys.readouterr()


def test_whatever_is_plotted_is_well_formed() -> None:
    """Names with markup in them, a single point, equal values, no points at all."""
    name = '<a & "b">'
    plots = [
        Plot(name, name, name, [Series(name, [Point(1.0, 2.0, name)], labelled=True)], level=(3.0, name)),
        Plot("flat", "x", "y", [Series("a", [Point(0, 0, "p"), Point(1, 0, "q")]), Series("b", [])]),
        Plot("empty", "x", "y", []),
    ]
    page = ElementTree.fromstring(html_page(name, [name], [*plots, Table(name, [name], [[name]])]))
    assert words_of(page).count(name) >= 8
    for circle in page.iter(f"{SVG}circle"):
        assert 0 <= float(circle.get("cx", "")) <= 960 and 0 <= float(circle.get("cy", "")) <= 380


def test_a_plot_is_a_file_of_its_own() -> None:
    """Factors of ten are as far apart as one another, and the legend is inside."""
    points = [Point(float(place), value, f"p{place}") for place, value in enumerate((0.01, 0.1, 1.0, 10.0))]
    plot = Plot("growth", "x", "y", [Series("<ours>", points), Series("theirs", points[:1])], logarithmic=True)
    drawn = ElementTree.fromstring(svg_of(plot))
    words = [text.text for text in drawn.iter(f"{SVG}text")]
    assert {"<ours>", "theirs", "0.05", "2"} <= set(words)
    heights = [float(c.get("cy", "")) for c in drawn.iter(f"{SVG}circle") if c.find(f"{SVG}title") is not None][:4]
    steps = [a - b for a, b in itertools.pairwise(heights)]
    assert min(steps) > 0 and max(steps) - min(steps) < 0.2


def boxes_of(drawn: ElementTree.Element, names: set[str]) -> list[tuple[float, float, float, float]]:
    """What the labels of a drawing cover, with room to spare."""
    found = []
    for text in drawn.iter(f"{SVG}text"):
        if text.text in names:
            x, y, width = float(text.get("x", "")), float(text.get("y", "")), 6 * len(text.text)
            left = x if text.get("text-anchor") == "start" else x - width
            found.append((left, y - 9, left + width, y))
    return found


def test_labels_of_points_that_are_close_do_not_cover_one_another() -> None:
    names = [f"recipe number {i}" for i in range(6)]
    series = [
        Series(name, [Point(70 + i % 2 * 0.2, 0.1 + i * 0.002, name, spread=0.01)], joined=False, labelled=True)
        for i, name in enumerate(names)
    ]
    far = Series("far", [Point(40.0, 1.4, "far", spread=2.0)], joined=False, labelled=True)
    for logarithmic in (False, True):
        page = html_page("t", [], [Plot("p", "x", "y", [*series, far], logarithmic=logarithmic)])
        drawn = ElementTree.fromstring(page)
        boxes = boxes_of(drawn, set(names))
        assert len(boxes) == 6
        for one, other in itertools.combinations(boxes, 2):
            assert one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]
        assert all(left >= 0 and right <= 960 for left, _, right, _ in boxes)
        bars = [line for line in drawn.iter(f"{SVG}line") if (line.get("stroke") or "").startswith("#")]
        assert len(bars) == 7
        assert all(0 <= float(bar.get(end, "")) <= 380 for bar in bars for end in ("y1", "y2"))
