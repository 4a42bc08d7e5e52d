"""Every family as a graph of OpenVINO gives transformers' logits, in one piece, token by token, and for several sequences."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from lowbit.models.spec import DecoderSpec
from lowbit.openvino.arena import Arena
from lowbit.openvino.decoder import build
from lowbit.openvino.library import core
from lowbit.openvino.opening import EXACT
from lowbit.runtime.files import open_files, read_spec, read_weights
from unit.family_cases import CASES, TOLERANCE, prompt, reference_logits, tiny_model


class Running:
    """A compiled model and its memory."""

    def __init__(self, model: Any) -> None:
        self.request = core().compile_model(model, "CPU", EXACT).create_infer_request()

    def logits(self, rows: list[list[int]], past: int = 0, beams: list[int] | None = None) -> NDArray[Any]:
        ids = np.array(rows, np.int64)
        end = past + ids.shape[1]
        if not past:
            self.request.reset_state()
        inputs = {
            "input_ids": ids,
            "attention_mask": np.ones((len(ids), end), np.int64),
            "position_ids": np.tile(np.arange(past, end), (len(ids), 1)),
            "beam_idx": np.array(beams or range(len(ids)), np.int32),
        }
        return self.request.infer(inputs)["logits"].copy()


@pytest.fixture(params=CASES, ids=lambda name: name.replace(", ", "-").replace(" ", "_"))
def case(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[DecoderSpec, Running, NDArray[Any]]]:
    model_type, fields = CASES[request.param]
    model = tiny_model(model_type, fields, "sdpa" if fields.get("alibi") else "eager")
    model.save_pretrained(tmp_path)
    files = open_files(tmp_path)
    spec = read_spec(files)
    with Arena() as arena:
        yield spec, Running(build(spec, read_weights(files, spec), arena)), reference_logits(model)


def changes(spec: DecoderSpec) -> bool:
    """Whether keys that were kept earlier were turned by other frequencies than those of a longer sequence."""
    return any(layer.rope is not None and layer.rope.depends_on_length for layer in spec.layers)


def test_logits_are_those_of_transformers(case: tuple[DecoderSpec, Running, NDArray[Any]]) -> None:
    spec, running, expected = case
    ids = prompt()
    assert np.abs(running.logits([ids])[0] - expected).max() < TOLERANCE
    if changes(spec):
        return
    for piece in (1, 7):
        got = [running.logits([ids[i : i + piece]], i)[0] for i in range(0, len(ids), piece)]
        assert np.abs(np.concatenate(got) - expected).max() < TOLERANCE


def test_sequences_change_places(case: tuple[DecoderSpec, Running, NDArray[Any]]) -> None:
    """Row 0 goes on from row 1's memory: what beam search asks for."""
    spec, running, expected = case
    ids = prompt()
    running.logits([ids[::-1][:-1], ids[:-1]])
    got = running.logits([ids[-1:]], len(ids) - 1, [1])
    whole = running.logits([ids])[0]
    assert np.abs(whole - expected).max() < TOLERANCE
    assert changes(spec) or np.abs(got[0, -1] - whole[-1]).max() < TOLERANCE
