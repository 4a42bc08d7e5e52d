"""Calls that a graph cannot answer, and calls that are broken off."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from lowbit.errors import LowbitError
from lowbit.openvino import OVModelForCausalLM, OVModelForFeatureExtraction, OVModelForImageClassification, native
from lowbit.openvino.opening import EXACT
from lowbit_assets import tiny_model
from unit.test_openvino_classes import bert, saved, vit

pytestmark = pytest.mark.transformers
PROMPT = [1, 90, 91, 92, 93, 94]


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    tiny_model("llama", folder / "model")
    OVModelForCausalLM.from_pretrained(folder / "model", export=True, compile=False).save_pretrained(folder / "graph")
    return folder / "graph"


@pytest.mark.slow
def test_a_shape_that_the_plugin_refuses(tmp_path: Path) -> None:
    pictures = OVModelForImageClassification.from_pretrained(saved(vit, tmp_path / "vit"), export=True)
    with pytest.raises(LowbitError, match=r"^OpenVINO refuses pixel_values \[1, 5, 32, 32\]: ") as caught:
        pictures(pixel_values=torch.rand(1, 5, 32, 32))
    assert "\n" not in str(caught.value) and "Exception from src" not in str(caught.value)
    texts = OVModelForFeatureExtraction.from_pretrained(saved(bert, tmp_path / "bert"), export=True, compile=False)
    texts.model.reshape({port.get_any_name(): [1, 4] for port in texts.model.inputs})
    assert texts(input_ids=torch.tensor([[1, 2, 3, 4]])).last_hidden_state.shape == (1, 4, 64)
    with pytest.raises(LowbitError, match=r"^OpenVINO refuses input_ids \[1, 3\], attention_mask \[1, 3\]"):
        texts(input_ids=torch.tensor([[1, 2, 3]]))
    with pytest.raises(LowbitError, match=r"^the graph needs pixel_values, and takes pixel_values$"):
        pictures()


def test_a_decoder_of_fixed_sizes_says_which_it_refuses(graph: Path) -> None:
    model = OVModelForCausalLM.from_pretrained(graph, compile=False, ov_config=EXACT)
    sizes = {port.get_any_name(): [-1] if len(port.partial_shape) == 1 else [1, -1] for port in model.model.inputs}
    model.model.reshape(sizes)
    assert model(torch.tensor([PROMPT])).logits.shape[:2] == (1, len(PROMPT))
    with pytest.raises(LowbitError, match=rf"^OpenVINO refuses input_ids \[2, {len(PROMPT)}\], "):
        model(torch.tensor([PROMPT] * 2))
    assert model(torch.tensor([PROMPT])).logits.shape[:2] == (1, len(PROMPT))


class _BreaksOff(transformers.generation.streamers.BaseStreamer):  # type: ignore[misc]  # transformers is not typed
    """Ctrl-C after some tokens."""

    def __init__(self, after: int) -> None:
        self.left = after

    def put(self, _: Any) -> None:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGINT)

    def end(self) -> None:
        """Nothing is kept."""


def test_ctrl_c_ends_an_answer_and_not_the_model(graph: Path) -> None:
    model = OVModelForCausalLM.from_pretrained(graph, ov_config=EXACT)
    given = {"max_new_tokens": 12, "do_sample": False, "min_new_tokens": 12}
    expected = model.generate(torch.tensor([PROMPT]), **given)
    with pytest.raises(KeyboardInterrupt):
        model.generate(torch.tensor([PROMPT]), streamer=_BreaksOff(4), **given)
    assert torch.equal(model.generate(torch.tensor([PROMPT]), **given), expected)


def test_ctrl_c_in_the_light_path(graph: Path) -> None:
    model = native.load(graph, ov_config=EXACT, slots=2)
    expected = model.generate(PROMPT, max_new_tokens=12, ignore_end=True).tokens
    with pytest.raises(KeyboardInterrupt):
        for count, _ in enumerate(model.stream(PROMPT, max_new_tokens=12, ignore_end=True)):
            if count == 3:
                os.kill(os.getpid(), signal.SIGINT)
    assert model.generate(PROMPT, max_new_tokens=12, ignore_end=True).tokens == expected
    assert model.beams(PROMPT, num_beams=2, max_new_tokens=4, ignore_end=True)[0].tokens
