"""Copies of a model, and torch's words for types and devices."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from lowbit.errors import LowbitError
from lowbit.openvino import OVModelForCausalLM, OVModelForFeatureExtraction, compress_weights
from lowbit.openvino.opening import EXACT
from lowbit.openvino.sites import low_bit_weights
from lowbit_assets import tiny_model
from unit.test_openvino_classes import bert, saved
from unit.test_openvino_seq2seq import inputs, kind
from unit.test_openvino_seq2seq import saved as saved_pair

pytestmark = pytest.mark.transformers
TOKENS = torch.tensor([[1, 90, 91, 92, 93, 94]])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("llama", tmp_path_factory.mktemp("tiny") / "model")


def test_a_copy_has_a_graph_of_its_own(tiny: Path, tmp_path: Path) -> None:
    model = OVModelForCausalLM.from_pretrained(tiny, export=True, ov_config=EXACT)
    expected, logits = model.generate(TOKENS, max_new_tokens=8, do_sample=False), model(TOKENS).logits
    made = copy.deepcopy(model)
    made.generation_config.max_new_tokens = 2
    made.model = compress_weights(made.model, mode="int4_sym", group_size=32)
    assert low_bit_weights(made.model) and not low_bit_weights(model.model)
    assert not torch.equal(made(TOKENS).logits, logits) and torch.equal(model(TOKENS).logits, logits)
    assert model.generation_config.max_new_tokens != 2
    # The files that both are read from stay as long as either of them.
    again = copy.deepcopy(model)
    del model
    assert torch.equal(again.generate(TOKENS, max_new_tokens=8, do_sample=False), expected)
    # One guesses for the other.
    guessed = again.generate(TOKENS, max_new_tokens=8, do_sample=False, assistant_model=copy.deepcopy(again))
    assert torch.equal(guessed, expected)
    again.save_pretrained(tmp_path)
    assert torch.equal(OVModelForCausalLM.from_pretrained(tmp_path, ov_config=EXACT)(TOKENS).logits, logits)


@pytest.mark.slow
def test_a_copy_of_two_graphs(tmp_path: Path) -> None:
    saved_pair("bart", tmp_path / "torch")
    model = kind("bart").from_pretrained(tmp_path / "torch", export=True, ov_config=EXACT)
    given, begun = inputs("bart"), torch.randint(3, 96, (2, 5))
    before = model(**given, decoder_input_ids=begun).logits
    made = copy.deepcopy(model)
    assert torch.equal(made(**given, decoder_input_ids=begun).logits, before)
    made.encoder.model = compress_weights(made.encoder.model, mode="int4_sym", group_size=32)
    made.to("CPU")
    assert not torch.equal(made(**given, decoder_input_ids=begun).logits, before)
    assert torch.equal(model(**given, decoder_input_ids=begun).logits, before)
    assert made.generate(**given, max_new_tokens=4).shape == model.generate(**given, max_new_tokens=4).shape
    size = sum(file.stat().st_size for file in model.folder.glob("*.bin"))
    assert model.half() is model
    model.save_pretrained(tmp_path / "half")
    assert sum(file.stat().st_size for file in (tmp_path / "half").glob("*model.bin")) < 0.6 * size
    after = model(**given, decoder_input_ids=begun).logits
    assert 0 < float((after - before).norm() / before.norm()) < 1e-3


def weight_bytes(folder: Path) -> int:
    return (folder / "openvino_model.bin").stat().st_size


def test_half_writes_half(tiny: Path, tmp_path: Path) -> None:
    original: Any = transformers.AutoModelForCausalLM.from_pretrained(tiny, dtype="float32")
    original.save_pretrained(tmp_path / "single")
    model = OVModelForCausalLM.from_pretrained(tmp_path / "single", export=True, ov_config=EXACT)
    logits = model(TOKENS).logits
    model.save_pretrained(tmp_path / "whole")
    assert model.half() is model
    model.save_pretrained(tmp_path / "half")
    assert weight_bytes(tmp_path / "half") < 0.55 * weight_bytes(tmp_path / "whole")
    again = OVModelForCausalLM.from_pretrained(tmp_path / "half", ov_config=EXACT)(TOKENS).logits
    assert torch.equal(model(TOKENS).logits, again)
    assert not torch.equal(again, logits)
    with torch.no_grad():  # what torch computes with weights that went through 16 bits
        torch.testing.assert_close(again, original.half().float()(TOKENS).logits, rtol=1e-4, atol=1e-4)
    # What is low-bit already stays.
    small = OVModelForCausalLM.from_pretrained(tmp_path / "single", export=True, load_in_8bit=True, ov_config=EXACT)
    names, before = low_bit_weights(small.model), small(TOKENS).logits
    assert low_bit_weights(small.half().model) == names
    assert float((small(TOKENS).logits - before).norm() / before.norm()) < 1e-3


def test_words_of_torch_are_answered(tmp_path: Path) -> None:
    model = OVModelForFeatureExtraction.from_pretrained(saved(bert, tmp_path), export=True, compile=False)
    with pytest.warns(UserWarning, match=r"^float\(\): does nothing, since a graph takes and gives float32"):
        assert model.float() is model
    assert model.cpu() is model and model.eval() is model and model.ov_device == "CPU"
    for word in ("bfloat16", "double"):
        with pytest.raises(LowbitError, match=rf"^{word}\(\): leave it out; ov_config=.*INFERENCE_PRECISION_HINT"):
            getattr(model, word)()
    for word in ("cuda", "xpu"):
        with pytest.raises(LowbitError, match=rf"^{word}\(\): name one of OpenVINO's, such as model\.to\(\"GPU\"\)"):
            getattr(model, word)()
    with pytest.raises(LowbitError, match=r"^to\(torch\.float16\): leave it out; ov_config="):
        model.to(torch.float16)
