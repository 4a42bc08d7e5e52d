"""Any torch module as a graph of OpenVINO: dense ones compute what torch does, packed ones arrive code for code."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForMaskedLM, BertModel, GPT2Config, GPT2Model

import lowbit
from lowbit.checkpoint.layout import held_weights
from lowbit.errors import LowbitError
from lowbit.grid import unpack
from lowbit.openvino.activations import EXACT
from lowbit.openvino.constants import hold
from lowbit.openvino.library import core, ov
from lowbit.openvino.tracing import trace
from lowbit.swap import copy_model, replace_module

# Following a module takes torch seconds.
pytestmark = pytest.mark.slow

BERT = {
    "vocab_size": 96,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "max_position_embeddings": 32,
}
CLOSE = 2e-6


def bert(kind: Any = BertModel) -> nn.Module:
    torch.manual_seed(0)
    return kind(BertConfig(**BERT)).eval()


def tokens(rows: int = 2, length: int = 7) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 96, (rows, length), generator=torch.Generator().manual_seed(rows))
    mask = torch.ones_like(ids)
    mask[-1, length - 2 :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def run(model: Any, inputs: dict[str, torch.Tensor]) -> list[np.ndarray]:
    compiled = core().compile_model(model, "CPU", EXACT)
    found = compiled({name: value.numpy() for name, value in inputs.items()})
    return [found[port].copy() for port in compiled.outputs]


def dense_copy(model: nn.Module) -> nn.Module:
    """The model with its packed weights as plain ones of the same numbers."""
    copied = copy_model(model)
    for held in held_weights(copied):
        module: Any = held.module
        dense = unpack(held.weight.packed())
        new: Any
        if isinstance(module, nn.Embedding):
            new = nn.Embedding.from_pretrained(dense)
        elif isinstance(module, nn.Linear):
            new = nn.Linear(module.in_features, module.out_features, module.bias is not None)
            new.weight, new.bias = nn.Parameter(dense), module.bias
        else:
            outputs, inputs, *kernel = module.weight_shape
            groups = module.options["groups"]
            new = nn.Conv2d(inputs * groups, outputs, tuple(kernel), **module.options, bias=module.bias is not None)
            new.weight, new.bias = nn.Parameter(dense.view(module.weight_shape)), module.bias
        replace_module(copied, held.path, new)
    return copied.eval()


def test_a_dense_module_gives_what_torch_gives_at_other_sizes() -> None:
    model = bert()
    found = trace(model, tokens(), ["last_hidden_state", "pooler_output"])
    assert [port.get_any_name() for port in found.model.inputs] == ["input_ids", "attention_mask"]
    inputs = tokens(3, 11)
    with torch.no_grad():
        expected = model(**inputs)
    hidden, pooled = run(found.model, inputs)
    np.testing.assert_allclose(hidden, expected.last_hidden_state.numpy(), atol=CLOSE)
    np.testing.assert_allclose(pooled, expected.pooler_output.numpy(), atol=CLOSE)
    assert not found.packed and "encoder.layer.0.attention.self.query" in found.dense


@pytest.mark.parametrize("format", ["int4_g32", "int4_asym_g32", "int8_channel", "nf4"])
def test_packed_weights_arrive_code_for_code(format: str, tmp_path: Path) -> None:
    model = bert()
    lowbit.optimize_model(model, format, embedding=format)
    packed = {held.path: held.weight.packed() for held in held_weights(model)}
    found = trace(model, tokens(), ["last_hidden_state", "pooler_output"])
    assert found.packed == {path: weight.format.name for path, weight in packed.items()}
    assert found.dense == ()
    ov.save_model(found.model, tmp_path / "openvino_model.xml", compress_to_fp16=False)
    read = core().read_model(tmp_path / "openvino_model.xml")
    constants = {node.get_friendly_name(): node for node in read.get_ops() if node.get_type_name() == "Constant"}
    for path, weight in packed.items():
        held, constant = hold(weight), constants[f"{path}.weight"]
        assert constant.get_element_type().to_string() == held.codes.type
        own = ov.Tensor(held.codes.array, ov.Shape(list(held.codes.shape)), getattr(ov.Type, held.codes.type))
        assert bytes(constant.get_tensor_view().data.tobytes()) == bytes(own.data.tobytes())
    inputs = tokens(3, 11)
    with torch.no_grad():
        expected = dense_copy(model)(**inputs).last_hidden_state
    np.testing.assert_allclose(run(read, inputs)[0], expected.numpy(), atol=CLOSE)


class Picture(nn.Module):
    """Convolutions with a norm that OpenVINO would fold into their weights."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(8, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.second = nn.Conv2d(16, 16, 3, stride=2, groups=4, bias=False)
        self.head = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.second(self.norm(self.first(x)).relu()).mean((2, 3)))


def test_packed_convolutions_keep_their_codes_beside_a_norm() -> None:
    torch.manual_seed(0)
    model = Picture().eval()
    model.norm.running_mean.normal_()
    model.norm.running_var.uniform_(0.5, 2)
    lowbit.optimize_model(model, "int8_channel", conv="int8_channel")
    found = trace(model, {"x": torch.rand(1, 8, 6, 6)}, ["scores"])
    assert set(found.packed) == {"first", "second", "head"}
    x = torch.rand(2, 8, 9, 12)
    with torch.no_grad():
        expected = dense_copy(model)(x)
    np.testing.assert_allclose(run(found.model, {"x": x})[0], expected.numpy(), atol=CLOSE)


def test_a_head_tied_to_its_embedding_is_one_constant() -> None:
    model = bert(BertForMaskedLM)
    lowbit.optimize_model(model, "int8_channel", embedding="int8_channel", head="int8_channel")
    found = trace(model, tokens(), ["logits"])
    codes = [node for node in found.model.get_ops() if node.get_friendly_name().endswith("word_embeddings.weight")]
    assert len(codes) == 1
    inputs = tokens(1, 5)
    with torch.no_grad():
        expected = dense_copy(model)(**inputs).logits
    np.testing.assert_allclose(run(found.model, inputs)[0], expected.numpy(), atol=5 * CLOSE)


def test_transposed_linears_arrive_as_they_are_packed() -> None:
    torch.manual_seed(0)
    model = GPT2Model(GPT2Config(vocab_size=96, n_positions=32, n_embd=64, n_layer=1, n_head=2)).eval()
    lowbit.optimize_model(model, "int4_g32")
    inputs = tokens()
    inputs["position_ids"] = torch.arange(7)[None].repeat(2, 1)
    found = trace(model, inputs, ["last_hidden_state"], {"use_cache": False})
    assert "h.0.attn.c_attn" in found.packed
    with torch.no_grad():
        expected = dense_copy(model)(**inputs).last_hidden_state
    np.testing.assert_allclose(run(found.model, inputs)[0], expected.numpy(), atol=5 * CLOSE)


class Idle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.used(x)


def test_a_packed_weight_that_no_output_needs_is_named() -> None:
    model = Idle()
    lowbit.optimize_model(model, "int4_g32")
    found = trace(model, {"x": torch.rand(1, 64)})
    assert found.packed == {"used": "int4_g32"} and found.unread == ("idle",)
    assert len(found.model.inputs) == 1


class Counting(nn.Module):
    def forward(self, x: torch.Tensor) -> Any:
        return {"text": "no tensor", "sum": x.sum()}


def test_an_output_that_is_not_there_lists_those_that_are() -> None:
    with pytest.raises(LowbitError, match="gives no tensor mean; it gives text, sum"):
        trace(Counting(), {"x": torch.rand(2)}, ["mean"])


def test_a_module_that_cannot_be_followed_is_one_sentence() -> None:
    class Odd(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.special.bessel_j0(x)

    with pytest.raises(LowbitError, match="Odd cannot be followed by OpenVINO") as caught:
        trace(Odd(), {"x": torch.rand(2)})
    assert "\n" not in str(caught.value)


def test_nothing_is_sent_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package's own conversion sends thirty messages, from a process each; openvino_telemetry comes with it."""
    telemetry = importlib.import_module("openvino_telemetry").Telemetry
    sent: list[Any] = []
    for word in ("send_event", "send_error", "send_stack_trace", "start_session"):
        monkeypatch.setattr(telemetry, word, lambda _, *values, **__: sent.append(values))
    small = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    ov.convert_model(small, example_input=torch.zeros(1, 8))
    assert sent
    sent.clear()
    trace(small, {"input": torch.zeros(1, 8)})
    assert not sent
