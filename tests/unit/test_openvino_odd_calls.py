"""Calls that a graph cannot answer, and calls that are broken off."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from lowbit.errors import CheckpointError, LowbitError
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


@pytest.mark.parametrize(
    ("kind", "longest"), [(transformers.BertConfig, 12), (transformers.RobertaConfig, 10)], ids=["bert", "roberta"]
)
def test_a_text_longer_than_the_table_of_positions(kind: Any, longest: int, tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = kind(**sizes, vocab_size=96, max_position_embeddings=12)
    saved(lambda: transformers.AutoModel.from_config(config), tmp_path / "model")
    load = OVModelForFeatureExtraction.from_pretrained
    load(tmp_path / "model", export=True, load_in_8bit=True, compile=False).save_pretrained(tmp_path / "graph")
    model = load(tmp_path / "graph")
    tokens = torch.full((2, longest), 7)
    assert model(input_ids=tokens).last_hidden_state.isfinite().all()
    tokens = torch.full((2, longest + 1), 7)
    sentence = rf"^the text has {longest + 1} tokens, and the model has places for {longest}: cut it"
    with pytest.raises(LowbitError, match=sentence):
        model(input_ids=tokens)
    if kind is transformers.RobertaConfig:  # padding takes no place there
        tokens[:, longest:] = config.pad_token_id
        assert model(input_ids=tokens).last_hidden_state.shape == (2, longest + 1, 32)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("hello", "a str"), ([[1, 2]], "a list"), (torch.tensor([1, 2]), r"\[2\] of torch\.int64"),
        (torch.rand(1, 2), r"\[1, 2\] of torch\.float32"), (torch.zeros(1, 0, dtype=torch.long), r"\[1, 0\] of"),
    ],
)  # fmt: skip
def test_what_are_no_tokens(graph: Path, given: Any, said: str) -> None:
    model = OVModelForCausalLM.from_pretrained(graph, compile=False)
    with pytest.raises(LowbitError, match=rf"^input_ids is a tensor of whole numbers \[rows, tokens\] .*, not {said}"):
        model(given)


def test_a_folder_is_named_in_more_ways_than_one(graph: Path) -> None:
    load = OVModelForCausalLM.from_pretrained
    expected = load(graph, ov_config=EXACT)(torch.tensor([PROMPT])).logits
    for named in (
        load(graph / "openvino_model.xml", ov_config=EXACT),
        load(graph.parent, subfolder="graph", ov_config=EXACT),
        load(str(graph), file_name="openvino_model.xml", ov_config=EXACT),
    ):
        assert torch.equal(named(torch.tensor([PROMPT])).logits, expected)


def test_words_that_do_nothing_are_told(graph: Path, tmp_path: Path) -> None:
    load = OVModelForCausalLM.from_pretrained
    with pytest.warns(UserWarning, match=r"^dtype, odd: is for an export, and .*graph has its graph already$"):
        load(graph, dtype="float16", odd=1, compile=False)
    with pytest.raises(
        LowbitError, match=r"^file_name='other\.xml' is not what an exported model has here: leave it out"
    ):
        load(graph, file_name="other.xml")
    with pytest.raises(LowbitError, match=r"^ov_config is a dict of OpenVINO's properties, not a list"):
        load(graph, ov_config=["a"])
    with pytest.raises(
        LowbitError, match=r"^OpenVINO refuses the model on CPU: NotFound: Unsupported property ODD by CPU"
    ):
        load(graph, ov_config={"ODD": 1})
    for name in ("openvino_model.xml", "openvino_model.bin"):
        (tmp_path / name).write_bytes((graph / name).read_bytes())
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read: .*not a valid JSON file"):
        load(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no config\.json: copy the one of the original model"):
        load(tmp_path)
    (tmp_path / "config.json").write_bytes((graph / "config.json").read_bytes())
    (tmp_path / "openvino_model.bin").write_bytes(b"short")
    with pytest.raises(
        CheckpointError, match=r"openvino_model\.xml cannot be read \(.*[Ii]ncorrect weights.*export the model again"
    ):
        load(tmp_path)


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
