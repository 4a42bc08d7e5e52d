"""Low-bit modules: ordinary modules that save, load, move, train and compile like the dense ones."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

import lowbit
from lowbit.errors import WeightError
from lowbit.formats import FORMATS, Format, as_format
from lowbit.grid import quantize, unpack
from lowbit.layers import (
    LowBitConv,
    LowBitEmbedding,
    LowBitExperts,
    LowBitLinear,
    PackedWeight,
    packed_weights,
    prepare_,
)
from lowbit.packing import PackedTensor
from lowbit.search import Search

torch.manual_seed(0)
FORMAT_NAMES = [
    *FORMATS,
    "int4_asym",
    "int3_asym_g32",
    "int4_fine",
    "int2_fine_g32",
    "int4_channel",
    "nf4_dq",
    "fp8_e4m3_tensor_fp32",
]


def linear(format: str, out_features: int = 24, in_features: int = 300, bias: bool = True) -> LowBitLinear:
    weight = torch.randn(out_features, in_features)
    packed = quantize(weight, as_format(format))
    return LowBitLinear(PackedWeight(packed), torch.randn(out_features) if bias else None)


@pytest.mark.parametrize("format", FORMAT_NAMES)
def test_linear_is_the_unpacked_linear(format: str) -> None:
    layer = linear(format)
    x = torch.randn(3, 5, 300)
    expected = nn.functional.linear(x, unpack(layer.packed_weight.packed()), layer.bias)
    # The kernel in use may round activations to int8; `reference` may not, unless the format says so.
    assert torch.allclose(layer(x), expected, atol=2e-2 * float(expected.abs().max()))
    layer.packed_weight.prepare_("reference")
    if as_format(format).act_bits == 16:
        assert torch.allclose(layer(x), expected, atol=1e-4)


@pytest.mark.parametrize("format", FORMAT_NAMES)
def test_state_dict_is_canonical_and_returns(format: str) -> None:
    layer = linear(format)
    before = layer.packed_weight.packed()
    prepare_(layer)
    state = layer.state_dict()
    assert set(state) == {"bias", *(f"packed_weight.{name}" for name in before.tensors())}
    other = linear(format)
    prepare_(other)
    other.load_state_dict(state)
    for name, tensor in before.tensors().items():
        assert torch.equal(other.packed_weight.packed().tensors()[name], tensor)
    x = torch.randn(2, 300)
    assert torch.equal(other(x), layer(x))


def test_casting_keeps_what_is_stored() -> None:
    layer = linear("int4", bias=True)
    prepare_(layer)
    stored = {name: t.clone() for name, t in layer.packed_weight.packed().tensors().items()}
    layer.half().to(torch.bfloat16)
    assert layer.bias is not None and layer.bias.dtype == torch.bfloat16
    assert layer.weight.dtype == torch.bfloat16
    for name, tensor in layer.packed_weight.packed().tensors().items():
        assert tensor.dtype == stored[name].dtype and torch.equal(tensor, stored[name])
    assert layer(torch.randn(2, 300, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_moving_goes_through_the_canonical_form() -> None:
    layer = linear("int4")
    prepare_(layer)
    codes = layer.packed_weight.packed().codes.clone()
    layer.to("meta")
    assert layer.packed_weight.packed().codes.device.type == "meta"
    layer.to_empty(device="cpu")
    assert layer.packed_weight.packed().codes.shape == codes.shape


@pytest.mark.parametrize("format", ["int4", "int4_asym_g32", "nf4", "int8_channel", "q4_k"])
def test_gradient_of_the_input(format: str) -> None:
    layer = linear(format)
    prepare_(layer)
    x = torch.randn(4, 300, requires_grad=True)
    target = torch.randn(4, 24)
    (layer(x) * target).sum().backward()
    expected = target @ unpack(layer.packed_weight.packed())
    assert x.grad is not None and torch.allclose(x.grad, expected, atol=1e-3)
    assert layer.bias is not None and layer.bias.grad is None


def test_gradient_passes_gradcheck() -> None:
    layer = linear("int4", out_features=5, in_features=40, bias=False)
    layer.packed_weight.prepare_("reference")
    x = torch.randn(2, 40, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,))


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="inductor needs a C++ compiler")
def test_inductor_compiles_around_the_custom_op(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile's own backend, with code of its own before, between and behind the products, and for the gradient."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model = nn.Sequential(nn.Tanh(), linear("int4", 64, 300), nn.GELU(), linear("nf4", 10, 64), nn.Softmax(-1))
    prepare_(model)
    compiled = torch.compile(model, fullgraph=True, backend="inductor")
    x, found = torch.randn(3, 300), []
    for run in (compiled, model):
        given = x.clone().requires_grad_()
        y = run(given)
        y.square().sum().backward()
        found.append((y, given.grad))
    assert list(tmp_path.rglob("*.so")), "inductor compiled nothing"
    (y, gradient), (y_plain, gradient_plain) = found
    assert torch.allclose(y, y_plain, atol=1e-5)
    assert torch.allclose(gradient, gradient_plain, rtol=1e-4, atol=1e-6) and gradient.abs().max() > 0


@pytest.mark.slow
def test_compiles_as_one_graph() -> None:
    model = nn.Sequential(linear("int4", 64, 300), nn.ReLU(), linear("nf4", 10, 64))
    prepare_(model)
    x = torch.randn(3, 300)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x), model(x), atol=1e-5)


@pytest.mark.slow
def test_a_convolution_compiles_as_one_graph() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2, padding=1)).eval()
    lowbit.optimize_model(model, low_bit="sym_int8", conv="int8_channel")
    assert all(isinstance(model[place], LowBitConv) for place in (0, 2))
    x = torch.randn(2, 3, 9, 9)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert torch.allclose(compiled(x), model(x), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["core", "reference"])
def test_a_whole_model_compiles_as_one_graph(kernel: str) -> None:
    """The packed embedding included, which int4 ties to the head."""
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4, vocab_size=200
    )
    config.tie_word_embeddings = True
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model = lowbit.optimize_model(model, "int4", kernel=kernel, compute="fp32")
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(ids, use_cache=False).logits
        assert torch.allclose(compiled, model(ids, use_cache=False).logits, atol=1e-5)


def test_custom_op_is_well_formed() -> None:
    from lowbit.kernels.autograd import linear as op

    packed = quantize(torch.randn(8, 64), as_format("int4_g32"))
    names = ",".join(packed.tensors())
    arguments = (
        torch.randn(2, 64, requires_grad=True),
        list(packed.tensors().values()),
        names,
        "reference",
        "int4_g32",
        [8, 64],
        "auto",
    )
    results = torch.library.opcheck(
        op, arguments, test_utils=("test_schema", "test_faketensor", "test_autograd_registration")
    )
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize(
    "format", ["int4", "int8_channel", "nf4", "int4_dq", "nvfp4", "mxfp4", "q6_k", "fp8_e5m2_tensor_fp32", "int3_asym"]
)
def test_embedding_looks_up_unpacked_rows(format: str) -> None:
    packed = quantize(torch.randn(50, 256), as_format(format))
    layer = LowBitEmbedding(PackedWeight(packed), padding_idx=0)
    ids = torch.tensor([[0, 3, 49], [3, 7, 7]])
    assert torch.equal(layer(ids), unpack(packed)[ids])


def test_embedding_scales_and_ties() -> None:
    held = PackedWeight(quantize(torch.randn(50, 64), as_format("int8")))
    embedding, head = LowBitEmbedding(held, scale=8.0), LowBitLinear(held)
    model = nn.ModuleDict({"embedding": embedding, "head": head})
    assert torch.equal(embedding(torch.tensor([4])), 8 * held.dense()[4:5])
    assert len(packed_weights(model)) == 1
    prepare_(model)
    assert torch.allclose(embedding(torch.tensor([4])), 8 * held.dense()[4:5])


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(6, 8, 3, stride=2, padding=1),
        nn.Conv2d(6, 6, 3, groups=6, padding="same", bias=False),
        nn.Conv1d(6, 9, 5, dilation=2, padding=3, padding_mode="reflect"),
        nn.Conv3d(2, 4, 2),
    ],
    ids=["strided", "depthwise", "reflect", "3d"],
)
def test_conv_is_the_dense_conv_of_its_weight(conv: nn.Module) -> None:
    assert isinstance(conv, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    packed = quantize(conv.weight.detach().flatten(1), as_format("int8_g32"))
    layer = LowBitConv(PackedWeight(packed), conv)
    size = (2, conv.in_channels) + (9,) * (conv.weight.dim() - 2)
    x = torch.randn(size)
    dense = copy.deepcopy(conv)
    dense.weight.data = unpack(packed).view_as(conv.weight)
    assert torch.allclose(layer(x), dense(x), atol=1e-5)


@pytest.mark.parametrize("format", FORMAT_NAMES)
def test_what_a_weight_reads_as_can_be_set_and_is_packed(format: str) -> None:
    layer = linear(format)
    prepare_(layer)
    update = torch.randn(24, 300)
    expected = quantize(layer.weight + update, as_format(format), Search())
    with pytest.warns(UserWarning, match="rounded to"):
        layer.weight.data += update
    held = layer.packed_weight.packed()
    assert all(torch.equal(held.tensors()[name], tensor) for name, tensor in expected.tensors().items())
    assert type(layer.weight + 1) is torch.Tensor
    with pytest.raises(WeightError, match="the new weight"):
        layer.weight.data = torch.full((24, 300), torch.nan)  # type: ignore[misc]
    assert torch.equal(layer.weight, unpack(expected))


def test_shapes_that_disagree_are_refused() -> None:
    packed = quantize(torch.randn(8, 64), as_format("int4"))
    from lowbit.errors import WeightError

    with pytest.raises(WeightError, match="codes of a int4 weight"):
        PackedTensor(packed.format, (8, 128), packed.codes, packed.scales)
    with pytest.raises(WeightError, match="scales of a int4_g32 weight"):
        PackedTensor(Format("int4_g32", 4, group_size=32), (8, 64), packed.codes, packed.scales)


def experts_layer(kernel: str, width: int = 64, inner: int = 48, count: int = 5) -> LowBitExperts:
    """A small mixture whose gate doubles and halves, so that no activation hides a mistake."""
    up = PackedWeight(quantize(torch.randn(count, 2 * inner, width), as_format("int8_g32")))
    down = PackedWeight(quantize(torch.randn(count, width, inner), as_format("int4_g16")))
    layer = LowBitExperts(up, down, lambda both: both[..., :inner] * both[..., inner:].sigmoid())
    prepare_(layer, kernel)
    return layer


def expected_mixture(layer: LowBitExperts, x: torch.Tensor, chosen: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """The same token by token, over unpacked weights."""
    up, down = unpack(layer.gate_up_proj.packed()), unpack(layer.down_proj.packed())
    rows = []
    for token, experts, weights in zip(x, chosen, shares, strict=True):
        inner = {int(e): layer.apply_gate(up[e] @ token) for e in experts if e < layer.num_experts}
        rows.append(
            sum(w * (down[e] @ inner[int(e)]) for e, w in zip(experts, weights, strict=True) if int(e) in inner)
        )
    return torch.stack([row if isinstance(row, torch.Tensor) else torch.zeros_like(x[0]) for row in rows])


@pytest.mark.parametrize("kernel", ["reference", "core"])
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_experts_are_the_sum_over_those_chosen(kernel: str, tokens: int) -> None:
    layer = experts_layer(kernel)
    for held in (layer.gate_up_proj, layer.down_proj):
        held.compute = "fp32"
    x, shares = torch.randn(tokens, 64), torch.rand(tokens, 2)
    # Expert 1 gets nobody, and an index past the last stays on another rank.
    chosen = torch.tensor([0, 2, 3, 4, 5])[torch.randint(5, (tokens, 2))]
    expected = expected_mixture(layer, x, chosen, shares)
    assert torch.allclose(layer(x, chosen, shares), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("kernel", ["reference", "core"])
def test_gradient_passes_through_experts(kernel: str) -> None:
    layer = experts_layer(kernel)
    for held in (layer.gate_up_proj, layer.down_proj):
        held.compute = "fp32"
    x, shares = torch.randn(7, 64, requires_grad=True), torch.rand(7, 2)
    chosen = torch.randint(6, (7, 2))
    target = torch.randn(7, 64)
    (layer(x, chosen, shares) * target).sum().backward()
    twin = x.detach().clone().requires_grad_()
    (expected_mixture(layer, twin, chosen, shares) * target).sum().backward()
    assert x.grad is not None and twin.grad is not None
    assert torch.allclose(x.grad, twin.grad, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_experts_compile_as_one_graph() -> None:
    layer = experts_layer("core")
    x, chosen, shares = torch.randn(6, 64), torch.randint(5, (6, 2)), torch.rand(6, 2)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x, chosen, shares), layer(x, chosen, shares), atol=1e-5)
