"""The benchmark beside peers: who is measured when, what counts, and which recipe may be set against which file."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import lowbit
from lowbit.core import calls
from unit.checkpoint_cases import make

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
QUALITY = {"fine": 0.1, "coarse": 0.3, "peer fine": 0.1003, "peer coarse": 0.35, "peer exact": 0.01}


@pytest.fixture(scope="module")
def peers() -> Iterator[dict[str, ModuleType]]:
    before = list(sys.path)
    sys.path.insert(0, str(BENCHMARKS))
    yield {
        name: importlib.import_module(f"peers.{name}") for name in ("rounds", "report", "runners", "tasks", "entries")
    }
    sys.path[:] = before


class Given:
    """A runner that gives what it was told, and notes that it was asked."""

    def __init__(
        self, peers: dict[str, ModuleType], name: str, readings: list[tuple[float, float]], asked: list[str]
    ) -> None:
        self.peers, self.name, self.readings, self.asked = peers, name, readings, asked

    def read(self, task: Any, seed: int) -> Any:
        self.asked.append(self.name)
        if seed >= len(self.readings):
            raise self.peers["runners"].PeerError("no more")
        value, others = self.readings[seed]
        return self.peers["runners"].Reading(value, others)

    def close(self) -> None:
        pass


class SteadyLimits:
    def read(self) -> dict[str, float]:
        return {"bandwidth": 40.0, "vector_peak": 1000.0, "tile_peak": 0.0}


def run(
    peers: dict[str, ModuleType], given: dict[str, list[tuple[float, float]]], rounds: int
) -> tuple[Any, list[str]]:
    asked: list[str] = []
    entries = [
        peers["entries"].Entry(
            name,
            "x",
            Path(),
            4,
            1000.0,
            lambda *_, n=name, r=readings: Given(peers, n, r, asked),
            ours=name == "lowbit",
        )
        for name, readings in given.items()
    ]
    row = peers["rounds"].Row("row", "model", 4, peers["tasks"].Task("decode", 32, 64), ratio=1.1)
    return peers["rounds"].run_row(row, entries, SteadyLimits(), rounds, looks=0), asked


def test_everybody_is_measured_in_every_round_and_in_changing_order(peers: dict[str, ModuleType]) -> None:
    steady = {name: [(10.0, 0.0)] * 6 for name in ("lowbit", "one", "two", "three")}
    _, asked = run(peers, steady, 6)
    rounds = [asked[i : i + 4] for i in range(0, 24, 4)]
    assert all(sorted(order) == sorted(steady) for order in rounds)
    assert len({order[0] for order in rounds}) > 1


def test_busy_readings_are_left_out_while_three_quiet_ones_remain(peers: dict[str, ModuleType]) -> None:
    found, _ = run(peers, {"lowbit": [(10, 0), (11, 0), (12, 0), (1, 0.5), (2, 0.5)]}, 5)
    line = found["lines"][0]
    assert (line["median"], line["low"], line["quiet"]) == (11, 10, 3)
    assert line["shares"]["bandwidth"] == pytest.approx(11 / 40)
    found, _ = run(peers, {"lowbit": [(10, 0), (11, 0), (12, 0.5), (1, 0.5), (2, 0.5)]}, 5)
    assert found["lines"][0]["median"] == 10 and peers["report"].too_noisy(found["lines"][0])


def test_a_peer_that_stops_is_named_and_its_readings_stay(peers: dict[str, ModuleType]) -> None:
    found, _ = run(peers, {"lowbit": [(10, 0)] * 3, "one": [(9, 0)]}, 3)
    assert "round 2: no more" in found["failed"]["one x"]
    assert {line["name"]: line["rounds"] for line in found["lines"]} == {"lowbit x": 3, "one x": 1}


def test_the_peers_of_python_are_asked_on_both_models(peers: dict[str, ModuleType], tmp_path: Path) -> None:
    entries, place = peers["entries"], peers["entries"].Place(tmp_path)
    for model in entries.SIZES:
        listed = {e.program: e for e in entries.entries(place, model, 4) if not e.ours}
        assert set(listed) == {
            "OpenVINO",
            "onnxruntime-genai",
            "torchao",
        }  # of llama.cpp's only the files that are there
        assert all(e.quality and model in str(e.path) for e in listed.values())
        for script, name in (("cpu_decode", "decode 32"), ("cpu_prefill", "prefill 512")):
            rows = importlib.import_module(script).ROWS
            (row,) = (r for r in rows if r.model == model and r.width == 4 and r.name.startswith(name))
            assert not row.only
    steps, prompt = (peers["tasks"].Task(kind, 32, 8) for kind in ("decode", "prefill"))
    (plain,) = (e for e in entries.entries(place, model, 16) if e.program == "transformers")
    for entry in (listed["torchao"], plain):
        assert [entries.words_of(v) for v in entry.to_try(steps)] == ["compile=True", "as it comes"]
        assert entry.to_try(prompt) == ((),)


def line(name: str, median: float, quality: str) -> dict[str, Any]:
    shares = {"bandwidth": 0.9}
    counts: dict[str, Any] = {"quiet": 5, "rounds": 5, "low": median, "high": median, "bandwidth": 40.0}
    ours = not quality.startswith("peer")
    return {
        "name": name,
        "program": name,
        "ours": ours,
        "median": median,
        "quality": quality,
        "unit": "tok/s",
        "shares": shares,
    } | counts


def test_a_peer_meets_the_fastest_recipe_that_is_no_worse_than_its_file(peers: dict[str, ModuleType]) -> None:
    rounds, report = peers["rounds"], peers["report"]
    row = rounds.Row("row", "model", 4, peers["tasks"].Task("decode", 32, 64), ratio=1.1)
    lines = [line("a", 100, "coarse"), line("b", 80, "fine"), line("c", 90, "peer coarse"), line("d", 70, "peer fine")]
    met = {m.peer["name"]: m for m in report.meetings({"lines": lines}, QUALITY, row)}
    assert met["c"].ours["name"] == "a" and met["d"].ours["name"] == "b"
    assert report.hardest(list(met.values()), row).peer["name"] == "c"
    assert report.goal_rows([row], {"row": {"lines": lines}}, QUALITY, False)[0][-1] == "met"
    lines.append(line("e", 10, "peer exact"))
    verdict = report.goal_rows([row], {"row": {"lines": lines}}, QUALITY, False)[0]
    assert verdict[-1] == "**missed**" and "no recipe of that quality" in verdict


def test_the_profile_of_a_row_is_the_middle_one(peers: dict[str, ModuleType]) -> None:
    readings = [
        {"mlp": mlp, "barrier": wait, "steps": 1, "barrier_count": 999}
        for mlp, wait in ((5, 1), (90, 2), (6, 1), (4, 1), (5, 0))
    ]
    assert peers["report"].median_profile(readings) == readings[0]


def test_a_row_that_misses_says_where_its_time_goes(peers: dict[str, ModuleType]) -> None:
    rounds, report, Task = peers["rounds"], peers["report"], peers["tasks"].Task
    rows = [rounds.Row(name, "model", 4, Task("decode", 32, 64), ratio=1.1) for name in ("quick", "slow", "old")]
    lines = [line("b", 80, "fine"), line("d", 76, "peer fine")]
    profile = {"of": "b", "mlp": 3_000_000, "norm": 1_000_000, "steps": 2, "barrier_count": 9}
    done = {"slow": {"lines": lines, "profile": profile}, "old": {"lines": lines}}
    done["quick"] = {"lines": [line("b", 90, "fine"), lines[1]], "profile": profile}
    said = report.missed_rows(rows, done, QUALITY, False).splitlines()
    assert said[2:] == [
        "- slow: our engine's first thread (b): mlp 75%, norm 25%; 2.00 ms a step.",
        "- old: no profile was taken.",
    ]
    stages = [
        {"stage": "imports", "seconds": 0.1, "megabytes": 40.0},
        {"stage": "load", "seconds": 0.25, "megabytes": 90},
    ]
    assert report.profile_text({"of": "b", "stages": stages}) == (
        "our process (b): imports until 0.10 s, 40 MB, load until 0.25 s, 90 MB"
    )


def test_every_wait_after_control_c_counts_and_not_the_usual_one(peers: dict[str, ModuleType]) -> None:
    report, Task = peers["report"], peers["tasks"].Task
    row = peers["rounds"].Row("row", "model", 4, Task("interrupt", 2048), most=0.3, only=("lowbit",))
    waits = line("b", 0.02, "fine") | {"unit": "s", "high": 0.2}
    for longest, verdict in ((0.2, "met"), (0.4, "**missed**")):
        found = report.goal_rows([row], {"row": {"lines": [waits | {"high": longest}]}}, QUALITY, False)[0]
        assert found[-1] == verdict and found[3:5] == ["", ""]


def test_laying_weights_out_is_held_to_its_rate(peers: dict[str, ModuleType]) -> None:
    report = peers["report"]
    (row, *_) = (r for r in importlib.import_module("cpu_start").ROWS if r.task.kind == "repack")
    assert report.goal_text(row, None, True) == ">= 3 GB/s"
    entries = peers["entries"]
    worker = entries.our_runner(entries.Place(Path()), Path(), (), row.task)
    assert worker.options == {"context": entries.SPARE}  # and not as many positions as the weight has rows
    for rate, verdict in ((3.1, "met"), (2.9, "**missed**")):
        found = line("lowbit int4", rate, "fine") | {"unit": "GB/s"}
        goal = report.goal_rows([row], {row.name: {"lines": [found]}}, QUALITY, True)[0]
        assert goal[2] == f"{rate} GB/s ({rate}-{rate})" and goal[3:] == ["", "", "", verdict]


def test_a_repack_is_of_the_packed_weights_that_have_so_many_rows(
    peers: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make("llama", tmp_path / "tiny", tie_word_embeddings=False)
    model = lowbit.AutoModelForCausalLM.from_pretrained(folder, load_in_low_bit="int4_g32")
    lowbit.save_low_bit(model, tmp_path / "saved")
    monkeypatch.syspath_prepend(str(peers["entries"].WORKERS))
    laid_out = importlib.import_module("run_ours").laid_out
    gates = 2 * model.config.num_hidden_layers
    for layer, count in ((model.model.layers[0].mlp.gate_proj, gates), (model.lm_head, 1)):  # not the embedding
        weight = layer.packed_weight
        seconds, size = laid_out(tmp_path / "saved", weight.shape[0])
        assert seconds > 0 and size == count * calls.prepared_bytes(weight.format, *weight.shape)
    with pytest.raises(ValueError, match="no packed weight of 7 rows"):
        laid_out(tmp_path / "saved", 7)
