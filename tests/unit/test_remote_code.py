"""A model whose code lies in its folder (`auto_map`): packed while it loads, saved with its code, loaded by transformers."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file

import lowbit
from unit.checkpoint_cases import IDS, logits

pytestmark = pytest.mark.transformers

CONFIGURATION = """
from transformers import PreTrainedConfig

class PebbleConfig(PreTrainedConfig):
    model_type = "pebble"

    def __init__(self, vocab_size=64, hidden_size=64, num_hidden_layers=2, **options):
        self.vocab_size, self.hidden_size, self.num_hidden_layers = vocab_size, hidden_size, num_hidden_layers
        super().__init__(**options)
"""
MODELING = """
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from .configuration_pebble import PebbleConfig
from .rounding_pebble import soften

class PebbleBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, 2 * config.hidden_size, bias=False)
        self.down_proj = nn.Linear(2 * config.hidden_size, config.hidden_size)

    def forward(self, x):
        return x + self.down_proj(soften(self.up_proj(x)))

class PebbleForCausalLM(PreTrainedModel):
    config_class = PebbleConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(PebbleBlock(config) for _ in range(config.num_hidden_layers))
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids, **options):
        x = self.embed_tokens(input_ids)
        for layer in self.layers:
            x = layer(x)
        return CausalLMOutput(logits=self.lm_head(x))
"""
ROUNDING = """
from torch.nn.functional import silu

def soften(x):
    return silu(x)
"""
CODE = {"configuration_pebble.py": CONFIGURATION, "modeling_pebble.py": MODELING, "rounding_pebble.py": ROUNDING}


@pytest.fixture
def pebble(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model that transformers does not know; its code is imported from a folder of this test's own."""
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "pebble"
    folder.mkdir()
    for name, text in CODE.items():
        (folder / name).write_text(text)
    auto_map = {
        "AutoConfig": "configuration_pebble.PebbleConfig",
        "AutoModelForCausalLM": "modeling_pebble.PebbleForCausalLM",
    }
    config = {"model_type": "pebble", "architectures": ["PebbleForCausalLM"], "auto_map": auto_map}
    (folder / "config.json").write_text(
        json.dumps(config | {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 2})
    )
    torch.manual_seed(0)
    tensors = {"embed_tokens.weight": torch.randn(64, 64), "lm_head.weight": torch.randn(64, 64)}
    for layer in range(2):
        tensors[f"layers.{layer}.up_proj.weight"] = torch.randn(128, 64) / 8
        tensors[f"layers.{layer}.down_proj.weight"] = torch.randn(64, 128) / 11
        tensors[f"layers.{layer}.down_proj.bias"] = torch.randn(64)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("way", ["save_low_bit", "save_pretrained"])
def test_there_and_back(pebble: Path, tmp_path: Path, way: str) -> None:
    model = lowbit.AutoModelForCausalLM.from_pretrained(pebble, load_in_4bit=True, trust_remote_code=True)
    assert type(model).__name__ == "PebbleForCausalLM"
    assert {row.path for row in model.lowbit_report.layers} >= {"layers.0.up_proj", "layers.1.down_proj", "lm_head"}
    expected = logits(model)
    getattr(model, way)(tmp_path / "low")
    assert set(CODE) <= {path.name for path in (tmp_path / "low").iterdir()}
    for loader in (transformers.AutoModelForCausalLM, lowbit.AutoModelForCausalLM):
        again = loader.from_pretrained(tmp_path / "low", trust_remote_code=True)
        assert again.lowbit_report.layers and torch.equal(logits(again), expected)
    assert expected.shape == (1, IDS.shape[1], 64)


def test_code_that_nobody_trusts_is_not_run(pebble: Path) -> None:
    (pebble / "modeling_pebble.py").write_text("raise SystemExit('this code ran')")
    (pebble / "configuration_pebble.py").write_text("raise SystemExit('this code ran')")
    for trust in ({}, {"trust_remote_code": False}):
        with pytest.raises(lowbit.CheckpointError, match="trust_remote_code=True") as caught:
            lowbit.AutoModelForCausalLM.from_pretrained(pebble, load_in_4bit=True, **trust)
        assert "'pebble'" in str(caught.value) and "\n" not in str(caught.value)
