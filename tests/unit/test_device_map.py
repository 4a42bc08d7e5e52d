"""device_map: on a CPU every way to say so works; devices that are not there, the disk and half measures are refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import lowbit
from lowbit.checkpoint.devices import check_device_map, one_place
from unit.checkpoint_cases import EVEN, IDS, logits, make

pytestmark = pytest.mark.transformers
Auto = lowbit.AutoModelForCausalLM
PER_MODULE = {
    "model.embed_tokens": "cpu",
    "model.layers": "cpu",
    "model.norm": "cpu",
    "model.rotary_emb": "cpu",
    "lm_head": "cpu",
}
WAYS = ["cpu", "auto", {"": "cpu"}, {"": torch.device("cpu")}, PER_MODULE, torch.device("cpu")]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("devices")
    make("llama", home / "dense", **EVEN)
    Auto.from_pretrained(home / "dense", load_in_4bit=True).save_low_bit(home / "low")
    return home


@pytest.mark.skipif(torch.cuda.is_available(), reason="'auto' would take the GPU; tests/gpu has that case")
@pytest.mark.parametrize("device_map", WAYS, ids=["cpu", "auto", "whole", "device", "per_module", "torch_device"])
def test_every_way_to_say_cpu(folders: Path, tmp_path: Path, device_map: Any) -> None:
    expected = logits(Auto.load_low_bit(folders / "low"))
    packed = Auto.from_pretrained(folders / "dense", load_in_4bit=True, device_map=device_map)
    read = transformers.AutoModelForCausalLM.from_pretrained(folders / "low", device_map=device_map)
    for model in (packed, read):
        assert model.device.type == "cpu" and torch.equal(logits(model), expected)
        assert model.generate(IDS[:, :4], max_new_tokens=2, do_sample=False).shape[1] > 4
    read.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(Auto.load_low_bit(tmp_path / "again")), expected)


@pytest.mark.parametrize(
    ("device_map", "message"),
    [
        ({"": "disk"}, "a format of fewer bits"),
        ({"model": "cpu", "lm_head": "disk"}, "a format of fewer bits"),
        ("meta", "low_memory_init"),
        ({"": torch.device("meta")}, "low_memory_init"),
    ],
)
def test_what_is_refused_everywhere(folders: Path, device_map: Any, message: str) -> None:
    for load in (Auto, transformers.AutoModelForCausalLM):
        with pytest.raises(lowbit.CheckpointError, match=message):
            load.from_pretrained(folders / "low", device_map=device_map)
    with pytest.raises(lowbit.CheckpointError, match=message):
        Auto.from_pretrained(folders / "dense", load_in_4bit=True, device_map=device_map)


ABSENT = [kind for kind in ("cuda", "xpu") if not getattr(torch, kind).is_available()]


@pytest.mark.skipif(not ABSENT, reason="this machine has every kind of device")
@pytest.mark.parametrize("kind", ABSENT)
def test_a_device_that_is_not_there_is_one_sentence(folders: Path, kind: str) -> None:
    for device_map in (kind, f"{kind}:0", {"": torch.device(kind, 0)}, {"model": "cpu", "lm_head": f"{kind}:0"}):
        with pytest.raises(lowbit.CheckpointError, match=f"torch sees no {kind} device here"):
            Auto.from_pretrained(folders / "low", device_map=device_map)
        with pytest.raises(lowbit.CheckpointError, match=f"torch sees no {kind} device here"):
            transformers.AutoModelForCausalLM.from_pretrained(folders / "low", device_map=device_map)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="this machine has a device 0")
def test_a_number_where_there_is_no_gpu_is_one_sentence(folders: Path) -> None:
    for device_map in (0, {"": 0}):
        with pytest.raises(lowbit.CheckpointError, match="device_map names device 0, and torch sees no GPU here"):
            Auto.from_pretrained(folders / "low", device_map=device_map)


def test_a_split_between_cpu_and_another_device_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(lowbit.CheckpointError, match="between cpu and cuda"):
        check_device_map({"model": "cuda:0", "lm_head": "cpu"})
    check_device_map({"model": "cuda:0", "lm_head": "cuda:1"})


@pytest.mark.parametrize(
    ("device_map", "place"),
    [
        ("auto", "cuda"),
        ({"": "balanced"}, "cuda"),
        ({"": 1}, 1),
        ({"model": "cuda:1", "lm_head": "cuda:1"}, "cuda:1"),
        ("cpu", "cpu"),
        (None, None),
    ],
)
def test_a_model_that_is_read_in_one_piece_goes_where_the_map_says(
    monkeypatch: pytest.MonkeyPatch, device_map: Any, place: Any
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert one_place(device_map) == place


def test_a_model_that_is_read_in_one_piece_is_not_spread() -> None:
    with pytest.raises(
        lowbit.CheckpointError, match="over cuda:0, cuda:1, and a folder of this kind is read in one piece"
    ):
        one_place({"model": "cuda:0", "lm_head": "cuda:1"})
