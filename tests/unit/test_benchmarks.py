"""What a page of results says of itself: the tree that ran, and how far its figures carry."""

import argparse
import importlib
import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def load() -> Iterator[object]:
    """Imports a script of benchmarks/, which lie outside of every package."""
    before = list(sys.path)
    sys.path.insert(0, str(BENCHMARKS))
    yield importlib.import_module
    sys.path[:] = before


def git(folder: Path, *arguments: str) -> None:
    own = ["-c", "user.name=test", "-c", "user.email=test@example.org", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", "-C", str(folder), *own, *arguments], check=True, capture_output=True)


def test_a_tree_that_differs_from_its_commit_is_marked(tmp_path: Path, load: object) -> None:
    common: ModuleType = load("common")  # type: ignore[operator]
    for name in ("src/lowbit/recipe.py", "benchmarks/one.py", "benchmarks/results/one.md", "docs/page.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("first\n")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "first")
    clean = common.commit_of_tree(tmp_path)
    assert re.fullmatch("[0-9a-f]{10}", clean)
    for harmless in ("benchmarks/results/one.md", "benchmarks/results/new.json", "docs/page.md"):
        (tmp_path / harmless).write_text("second\n")
        assert common.commit_of_tree(tmp_path) == clean, harmless
    for name in ("src/lowbit/recipe.py", "src/lowbit/new.py", "benchmarks/one.py", "benchmarks/peers/new.py"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        before = path.read_text() if path.exists() else None
        path.write_text("second\n")
        assert common.commit_of_tree(tmp_path) == f"{clean}, with uncommitted changes", name
        path.write_text(before) if before is not None else path.unlink()
    (tmp_path / "src/lowbit/recipe.py").write_text("second\n")
    assert common.changed_since(clean, ["src"], tmp_path) == ["src/lowbit/recipe.py"]
    assert common.changed_since("0000000000", ["src"], tmp_path) == []


def test_a_small_run_leaves_the_kept_table_alone(load: object) -> None:
    common: ModuleType = load("common")  # type: ignore[operator]
    default_format: ModuleType = load("default_format")  # type: ignore[operator]
    assert default_format.home_of(windows=6, kept=False) == common.SCRATCH
    assert (
        default_format.home_of(windows=48, kept=False) == default_format.home_of(windows=6, kept=True) == common.RESULTS
    )
    assert (
        common.SCRATCH not in (common.RESULTS, *common.RESULTS.parents) and common.RESULTS not in common.SCRATCH.parents
    )


def test_the_page_of_the_default_says_how_far_it_carries(load: object) -> None:
    default_format: ModuleType = load("default_format")  # type: ignore[operator]
    data = json.loads((BENCHMARKS / "results" / "default_format.json").read_text())
    made = default_format.report(data)
    page = (BENCHMARKS / "results" / "default_format.md").read_text()
    for said in (
        "Not held out",
        "other drafts of the model** the default has KL 0.352",
        "Q8_0",
        "What was varied",
        "compressed-tensors",
    ):
        assert said in made and said in page, said
    assert "int4_g32_dq, v int6_g32_dq, tied int5_asym_g32_dq: KL 0.249 at 4.574 bits" in page
    # No figure of the page was written by hand: the script gives them all.
    for line in page.splitlines():
        if line.startswith("| int"):
            assert line in made


def test_rows_measured_again_stand_beside_the_first(load: object) -> None:
    default_format: ModuleType = load("default_format")  # type: ignore[operator]
    measured_again: ModuleType = load("measured_again")  # type: ignore[operator]
    data = json.loads((BENCHMARKS / "results" / "default_format.json").read_text())
    data.pop(measured_again.AGAIN, None)
    assert measured_again.section(data) == []
    machine = data["machine"] | {"commit": "later"}
    for shift in (0.5, 0.001):  # the second run takes the place of the first
        rows = measured_again.begin_run(data, machine, windows=2)
        row = json.loads(json.dumps(data["rows"][0]))
        for numbers in row["texts"].values():
            numbers["windows_kl"] = [kl + shift for kl in numbers["windows_kl"][:2]]
        rows.append(row)
    page = default_format.report(data)
    found = page.partition("## Measured again")[2].partition("\n## ")[0]
    (line,) = (line for line in found.splitlines() if line.startswith("| int"))
    assert line.startswith(f"| {row['name']} | {row['bits']:.3f} | {row['bits']:.3f} |")
    assert line.endswith("| +0.001000 | 0.001000 |") and "the first 2 of the 48 windows of each text" in page
    assert f"1 of the {len(data['rows'])} rows were measured again at later; they differ by 0.001000 at most" in page


def test_an_unknown_row_is_told_with_the_nearest(load: object) -> None:
    default_format: ModuleType = load("default_format")  # type: ignore[operator]
    with pytest.raises(SystemExit, match="did you mean int4_g64, tied int5_g32"):
        default_format.measure_again(argparse.Namespace(only=["int4_g64, tied int5_g3"]))


def quality_row(program: str, algorithm: str, scheme: str, kl: float, **more: object) -> dict[str, object]:
    """A row of quality.json whose windows differ, but differ alike in all rows."""
    texts = {}
    for text in ("sqlite_valid", "moby_dick"):
        windows = [kl + 0.1 * i for i in range(4)]
        numbers = {"kl": sum(windows) / 4, "standard_error": 0.1, "agreement": 0.5, "windows_kl": windows}
        texts[text] = numbers | {"perplexity": {"ppl": 30.0}, "original": {"ppl": 20.0}}
    row = {"name": f"{program} {algorithm}, {scheme}", "program": program, "algorithm": algorithm, "scheme": scheme}
    return row | {"bits": 4.25, "texts": texts, "machine": 0} | more


def quality_data(*rows: dict[str, object]) -> dict[str, object]:
    machine = {"processor": "one", "commit": "two", "command": "three", "date": "four"}
    return {"machine": machine, "machines": [machine], "windows": 4, "samples": 8, "rows": list(rows)}


def test_quality_is_judged_window_by_window(load: object) -> None:
    report: ModuleType = load("quality_report")  # type: ignore[operator]
    one, other = quality_row("lowbit", "gptq", "W4 g64", 0.201), quality_row("llm-compressor", "gptq", "W4 g64", 0.2)
    apart = report.difference(one, other)
    # The windows differ by 0.1 among one another, the rows by 0.001 in every window.
    assert apart.mean == pytest.approx(0.001) and apart.error < 1e-9 and not apart.within
    assert report.difference(other, one).within and report.difference(other, one).clear
    assert report.difference(one, one).within and not report.difference(one, one).clear


def test_promises_are_met_or_missed_by_the_rows(load: object) -> None:
    report: ModuleType = load("quality_report")  # type: ignore[operator]
    alone = {"alone": True, "host_bytes": 1e9, "device_bytes": 0}
    data = quality_data(
        quality_row("lowbit", "plain rtn", "W4 g64", 0.4),
        quality_row("lowbit", "rtn", "W4 g64", 0.3),
        quality_row("lowbit", "awq", "W4 g64", 0.35),
        quality_row("lowbit", "gptq", "W4 g64", 0.2, seconds=9.0, **alone),
        quality_row("llm-compressor", "gptq", "W4 g64", 0.19, seconds=8.0, **alone),
        quality_row("lowbit", "autoround", "W4 g64", 0.18, seconds=5.0, **alone),
        quality_row("auto-round", "autoround", "W4 g64", 0.2, seconds=10.0, alone=False),
        quality_row("lowbit", "autoround", "W2 g64", 1.0, bits=2.25),
        quality_row("lowbit", "autoround asym", "W2 g64", 0.5, bits=2.375),
        quality_row("hqq", "hqq", "W2 g64", 1.5, bits=2.25),
        quality_row("llama.cpp", "Q4_K_M", "Q4_K_M", 0.1, bits=4.8),
        quality_row("lowbit", "gptq, bits allocated", "Q4_K_M", 0.09, bits=4.9),
        {
            "name": "hqq hqq, W4",
            "program": "hqq",
            "algorithm": "hqq",
            "scheme": "W4",
            "error": "it has no\nsuch bits",
            "machine": 0,
        },
    )
    found = {verdict.what: verdict.kept for verdict in report.judge(data)}
    times = [verdict for verdict in report.judge(data) if " s against " in verdict.figures]
    assert [(verdict.what, verdict.kept) for verdict in times] == [("gptq against llm-compressor gptq, W4 g64", False)]
    assert found["rtn against plain rtn, W4 g64"] and not found["awq against rtn, W4 g64"]
    assert not found["gptq against llm-compressor gptq, W4 g64"]
    # More bits than the peer's are no fair comparison.
    assert found["autoround against hqq hqq, W2 g64"] and not found["gptq, bits allocated against Q4_K_M"]
    page = report.page(data)
    assert "hqq hqq, W4: it has no such bits" in page and "~10.0" in page and "| 9.0 |" in page
    assert (
        "one standard error: **missed** (1 of 2 comparisons)" in page
        and found["autoround against auto-round autoround, W4 g64"]
    )
    assert "| **lowbit gptq** | 4.250 | 0.3500 ± 0.1000 |" in page
    assert report.plot_of(data).count("<circle") > len(data["rows"])


def test_quality_knows_what_a_format_costs(load: object) -> None:
    rows: ModuleType = load("quality_rows")  # type: ignore[operator]
    shapes = [(576, 576), (192, 1536)]
    assert rows.stored_bits(shapes, 4, 64, 0) == pytest.approx(4.25)
    assert rows.stored_bits(shapes, 4, 64, 16) == pytest.approx(4.5)
    assert rows.stored_bits(shapes, 8, 0, 0) == pytest.approx(8 + 16 * 768 / (576 * 576 + 192 * 1536))
    named = [row.name for row in rows.all_rows()]
    assert len(named) == len(set(named)) and "lowbit gptq, W3 g64" in named
    scripts = load("peers.rounders").SCRIPTS  # type: ignore[operator]
    for row in rows.all_rows():
        assert row.program == "llama.cpp" or rows.worker_of(row) in scripts


def test_the_page_of_quality_is_made_from_its_numbers_and_none_is_missing(load: object) -> None:
    rows, report = (load(name) for name in ("quality_rows", "quality_report"))  # type: ignore[operator]
    data = json.loads((BENCHMARKS / "results" / "quality.json").read_text())
    title, _, rest = report.page(data).partition("\n")  # the machine stands between them
    page = (BENCHMARKS / "results" / "quality.md").read_text()
    assert page.startswith(title) and page.endswith(rest)
    assert (BENCHMARKS / "results" / "quality.svg").read_text() == report.plot_of(data)
    measured = {row["name"] for row in data["rows"] if "error" not in row}
    asked = {row.name for row in rows.all_rows()}
    asked |= {f"lowbit {name}, bits allocated, {kind}" for name in ("gptq", "autoround") for kind in rows.GGUF}
    assert asked == measured
    verdicts = report.judge(data)
    assert not [verdict.what for verdict in verdicts if not verdict.kept]
    # Every algorithm at every width that its own project has as well, and each of the promises.
    compared = {verdict.what for verdict in verdicts}
    for ours, others in report.PAIRS.items():
        for theirs in others:
            for scheme in rows.FORMATS:
                if f"lowbit {ours}, {scheme}" in asked and f"{' '.join(theirs)}, {scheme}" in asked:
                    assert f"{ours} against {' '.join(theirs)}, {scheme}" in compared
    assert len({verdict.promise for verdict in verdicts}) == 5


def test_gptq_of_the_large_model_stays_within_its_memory() -> None:
    found = json.loads((BENCHMARKS / "results" / "quantize_memory.json").read_text())
    terms = found["terms"]
    assert terms["room"] == 1e9 and found["limit"] == sum(terms.values()) and found["found"]["peak"] <= found["limit"]
    assert terms["its low-bit size"] == found["found"]["size"]


def test_promises_of_old_names_are_judged_either_way(load: object) -> None:
    old_apis: ModuleType = load("old_apis")  # type: ignore[operator]
    cost, gain = old_apis.PROMISES["runner"], old_apis.PROMISES["decode"]
    assert cost.kept(0.2) and not cost.kept(0.4) and gain.kept(2.1) and not gain.kept(1.9)
    assert old_apis.line(gain, {"figure": 1.9, "plain, tokens/s": 4.0})[1:] == (
        "1.9 times (plain, tokens/s 4)",
        "at least 2",
        "no",
    )


def test_an_export_beside_optimum_intels_is_held_to_its_bounds(tmp_path: Path) -> None:
    """By its path: under its own name it would be found where a script asks for the package."""
    before = list(sys.path)
    sys.path.insert(0, str(BENCHMARKS))
    try:
        spec = importlib.util.spec_from_file_location("openvino_benchmark", BENCHMARKS / "openvino.py")
        assert spec is not None and spec.loader is not None
        script = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = script
        spec.loader.exec_module(script)
    finally:
        sys.path[:] = before
        sys.modules.pop("openvino_benchmark", None)
    sides = {"theirs": (100.0, 4000.0), "ours": (40.0, 2100.0), script.VERIFIED: (50.0, 1000.0)}
    figures = {side: dict(zip(("seconds", "megabytes"), pair, strict=True)) for side, pair in sides.items()}
    kept = [promise.row()[-1] for promise in script.promises("export", figures)]
    assert kept == ["yes", "**no**", "yes", "yes"]
    assert script.promises("decode", {"ours": 20.0, "theirs": 21.0})[0].row()[-1] == "**no**"
    nats = {side: {"nats": dict.fromkeys(script.TEXTS, value)} for side, value in (("ours", 3.0), ("theirs", 3.1))}
    rows = [promise.row() for promise in script.promises("perplexity-sym", nats)]
    assert [row[3:] for row in rows] == [("0.905", "at most 1", "yes")] * 2
    seconds, peak = script.timed([sys.executable, "-c", "x = b'1' * 60_000_000"], threads=1)
    assert seconds > 0 and 60_000_000 < peak < 100_000_000
