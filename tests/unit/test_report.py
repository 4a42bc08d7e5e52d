"""The report as JSON: there and back, nothing in it that is no JSON, and damage as one sentence."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from lowbit.cli.output import Output
from lowbit.cli.report import print_report
from lowbit.errors import CheckpointError
from lowbit.report import LayerReport, Report, Skipped

ROW = LayerReport("model.layers.0.mlp.up_proj", "linear", "int4", [8, 64], 1024, 288, 0.07, "core", "a note")
REPORT = Report("int4", [ROW], [Skipped("lm_head", "asked for", 99)], 12, 6, 1.5)


def test_what_is_remarked_of_many_weights_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    def row(path: str, note: str) -> LayerReport:
        return LayerReport(path, "linear", "int4", [8, 64], 1024, 288, 0.07, "core", note)

    blocks = [row(f"model.layers.{i}.mlp.{name}", f"block {i}") for i in range(14) for name in ("up_proj", "down_proj")]
    report = Report("int4", [*blocks, row("lm_head", ""), row("a.q", "both"), row("b.q", "both")])
    print_report(Output(False), report)
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    assert notes[:2] == [f"note: 2 weights of model.layers.{i}.mlp: block {i}" for i in (0, 1)]
    assert len(notes) == 13 and notes[-1] == "note: 3 more (--all shows them)"
    print_report(Output(False), report, everything=True)
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    assert len(notes) == 30 and notes[0] == "note: model.layers.0.mlp.up_proj: block 0" and "b.q: both" in notes[-1]
    print_report(Output(False), Report("int4", report.layers[-3:]))
    assert "note: 2 weights of the model: both" in capsys.readouterr().out


def test_there_and_back() -> None:
    assert Report.from_dict(json.loads(REPORT.to_json())) == REPORT
    assert Report.from_dict({}) == Report()
    assert Report.from_dict(REPORT.to_dict() | {"of a later version": 1}) == REPORT


def test_an_error_that_nobody_measured_is_null() -> None:
    report = Report(layers=[LayerReport("lm_head", "head", "int4", [8, 64], 1024, 288, math.nan)])
    fields = json.loads(report.to_json())
    assert fields["layers"][0]["error"] is None
    assert math.isnan(Report.from_dict(fields).layers[0].error)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"layers": 5}, "its layers are no list"),
        ({"layers": [1]}, "1 is no line of it"),
        ({"layers": [{"path": "x"}]}, "missing"),
        ({"layers": [{**REPORT.to_dict()["layers"][0], "shape": "q"}]}, "it says shape = 'q'"),
        ({"layers": [{**REPORT.to_dict()["layers"][0], "shape": [8, "q"]}]}, "it says shape = [8, 'q']"),
        ({"layers": [{**REPORT.to_dict()["layers"][0], "bytes_after": True}]}, "it says bytes_after = True"),
        ({"skipped": [{"path": 3}]}, "it says path = 3"),
        ({"seconds": "long"}, "it says seconds = 'long'"),
    ],
)
def test_damage_is_one_sentence(change: dict[str, Any], said: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        Report.from_dict(REPORT.to_dict() | change)
    message = str(caught.value)
    assert said in message and "lowbit_report.json" in message and "\n" not in message
