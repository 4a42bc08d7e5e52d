"""device_map on an NVIDIA GPU: packed, loaded and saved there, by the reference kernel."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import lowbit
from unit.checkpoint_cases import EVEN, IDS, make

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]
Auto = lowbit.AutoModelForCausalLM
EVERYWHERE = {"model.embed_tokens": 0, "model.layers": 0, "model.norm": 0, "model.rotary_emb": 0, "lm_head": 0}


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    result: torch.Tensor = model(IDS.to(model.device)).logits
    return result.float().cpu()


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("llama", tmp_path_factory.mktemp("gpu") / "dense", **EVEN)


@pytest.mark.parametrize("device_map", ["cuda", "auto", 0, {"": "cuda:0"}, EVERYWHERE], ids=str)
def test_packed_and_read_on_the_gpu(dense: Path, tmp_path: Path, device_map: Any) -> None:
    model = Auto.from_pretrained(dense, load_in_4bit=True, device_map=device_map)
    assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"cuda"}
    assert {row.kernel for row in lowbit.explain(model).rows} == {"reference"}
    on_cpu = Auto.from_pretrained(dense, load_in_4bit=True, kernel="reference")
    assert torch.allclose(logits(model), logits(on_cpu), atol=1e-3)
    model.save_low_bit(tmp_path / "low")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "low", device_map=device_map)
    assert again.device.type == "cuda" and torch.equal(logits(again), logits(model))
    assert type(again.model.embed_tokens) is type(model.model.embed_tokens) is not torch.nn.Embedding
    assert again.generate(IDS[:, :4].to("cuda"), max_new_tokens=3, do_sample=False).device.type == "cuda"


def test_to_the_cpu_and_back(dense: Path, tmp_path: Path) -> None:
    model = Auto.from_pretrained(dense, load_in_4bit=True, device_map="cuda")
    expected = logits(model)
    model.save_low_bit(tmp_path / "low")
    assert torch.equal(logits(model.to("cpu")), logits(Auto.load_low_bit(tmp_path / "low")))
    assert torch.equal(logits(model.to("cuda")), expected)


def test_where_a_configuration_has_a_model_quantised(dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """INC_TARGET_DEVICE: on the GPU for the CPU, and the other way round, where the GPU never holds the dense weights."""
    held: dict[str, int] = {}
    made: dict[str, Any] = {}
    for target, place in (("cuda", "cpu"), ("CPU", "cuda")):
        monkeypatch.setenv("INC_TARGET_DEVICE", target)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        made[place] = Auto.from_pretrained(dense, quantization_config=lowbit.RtnConfig(group_size=64), device_map=place)
        held[place] = torch.cuda.max_memory_allocated() - before
        assert {tensor.device.type for tensor in (*made[place].parameters(), *made[place].buffers())} == {place}
    whole = sum(file.stat().st_size for file in dense.glob("*.safetensors"))
    assert held["cpu"] > 0 and 0 < held["cuda"] < whole
    assert made["cpu"].lowbit_report.formats() == made["cuda"].lowbit_report.formats()
    found, expected = logits(made["cpu"]), logits(made["cuda"])
    assert float((found - expected).norm() / expected.norm()) < 0.05
