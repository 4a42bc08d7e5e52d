"""Folders of OpenVINO's: which of two models in one is opened, what lies beside a graph, and what is refused in a sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from lowbit.errors import LowbitError
from lowbit.openvino import OVModelForCausalLM
from lowbit.openvino.library import device
from lowbit.openvino.opening import EXACT
from lowbit_assets import tiny_model

pytestmark = pytest.mark.transformers
TOKENS = torch.tensor([[1, 90, 91, 92, 93, 94]])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("llama", tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def model(tiny: Path) -> OVModelForCausalLM:
    return OVModelForCausalLM.from_pretrained(tiny, export=True, ov_config=EXACT)


def test_an_export_is_made_anew_from_shards(tiny: Path, tmp_path: Path) -> None:
    """The folder holds an older graph, and the weights of its original in several files."""
    original: Any = transformers.AutoModelForCausalLM.from_pretrained(tiny, dtype="float32")
    original.save_pretrained(tmp_path, max_shard_size="100KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    load = OVModelForCausalLM.from_pretrained
    load(tmp_path, export=True, compile=False).save_pretrained(tmp_path)
    original.lm_head.weight.data.mul_(2)
    original.save_pretrained(tmp_path, max_shard_size="100KB")
    with torch.no_grad():
        wanted = original(TOKENS).logits
    found = load(tmp_path, export=True, ov_config=EXACT)(TOKENS).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(load(tmp_path, ov_config=EXACT)(TOKENS).logits, wanted / 2, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("token", [99999, -1])
def test_a_token_beyond_the_vocabulary_is_named(model: OVModelForCausalLM, token: int) -> None:
    with pytest.raises(LowbitError, match=rf"^token {token} is none of the vocabulary, which has 0 to \d+: "):
        model.generate(torch.tensor([[1, token]]), max_new_tokens=2)


def test_devices_to_choose_among_are_looked_for() -> None:
    assert device("AUTO") == "AUTO" and device("auto:cpu") == "AUTO:CPU" and device("AUTO:CPU,-GPU") == "AUTO:CPU,-GPU"
    assert device("BATCH:CPU(4)") == "BATCH:CPU(4)"
    for name, absent in (("AUTO:NPU,CPU", "NPU"), ("HETERO:CPU,XPU", "XPU"), ("MULTI:GPU:7", r"GPU\.7")):
        with pytest.raises(LowbitError, match=rf"there is no device '{absent}', which '{name}' names, here: OpenVINO"):
            device(name)
