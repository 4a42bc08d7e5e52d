"""`ipex.llm.modules` and `ipex.llm.functional`: what model code that is written with them gets."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from lowbit.compat.faces.intel_extension_for_pytorch.llm import functional, modules

X = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))


def rotated(x: torch.Tensor, position: int, half: bool, base: float = 10000) -> torch.Tensor:
    """One head at one position, pair by pair."""
    y, pairs = x.clone(), len(x) // 2
    for i in range(pairs):
        angle = torch.tensor(position * base ** (-2 * i / len(x)))
        a, b = (i, i + pairs) if half else (2 * i, 2 * i + 1)
        y[a] = x[a] * angle.cos() - x[b] * angle.sin()
        y[b] = x[b] * angle.cos() + x[a] * angle.sin()
    return y


def test_modules() -> None:
    torch.manual_seed(0)
    linear, second = nn.Linear(16, 16), nn.Linear(16, 16)
    y, other = linear(X), torch.randn(2, 5, 16)
    expected = {
        modules.LinearSilu: F.silu(y),
        modules.LinearRelu: F.relu(y),
        modules.LinearGelu: F.gelu(y),
        modules.LinearNewGelu: F.gelu(y, approximate="tanh"),
    }
    for kind, value in expected.items():
        assert torch.equal(kind(linear)(X), value)
    assert torch.equal(modules.LinearMul(linear)(X, other), y * other)
    assert torch.equal(modules.LinearAdd(linear)(X, other), y + other)
    assert torch.equal(modules.LinearAddAdd(linear)(X, other, other), y + other + other)
    assert torch.equal(modules.LinearSiluMul(linear)(X, other), F.silu(y) * other)
    assert torch.equal(modules.Linear2SiluMul(linear, second)(X), F.silu(y) * second(X))
    weight = torch.rand(16)
    rms = X * torch.rsqrt(X.square().mean(-1, keepdim=True) + 1e-6) * weight
    assert torch.allclose(modules.RMSNorm(16, 1e-6, weight)(X), rms, atol=1e-6)
    assert torch.allclose(modules.RMSNorm.apply_function(X, weight, 1e-6), rms, atol=1e-6)
    assert torch.allclose(modules.FastLayerNorm((16,), 1e-5, weight, weight)(X), F.layer_norm(X, (16,), weight, weight))
    ends, queries, out = torch.tensor([0, 3, 5]), torch.randn(5, 2, 8), torch.empty(5, 2, 8)
    packed = (queries, queries, queries, out, ends, ends, 3, 3, 0.0, 0.5, False, True, False, None)
    alone = F.scaled_dot_product_attention(*(queries[3:].transpose(0, 1),) * 3, is_causal=True, scale=0.5)
    for attend in (modules.VarlenAttention(), modules.VarlenAttention.apply_function):
        out.zero_()
        attend(*packed)
        assert torch.allclose(out[3:], alone.transpose(0, 1), atol=1e-5)
    for offset, half in ((4, True), (1, False)):
        rope = modules.RotaryEmbedding(64, 8, 10000)
        found = rope(X, torch.arange(3, 8).expand(2, 5), 2, 8, offset, 8)
        assert found.shape == (2, 5, 2, 8)
        assert torch.allclose(found[1, 2, 1], rotated(X.view(2, 5, 2, 8)[1, 2, 1], 5, half), atol=1e-5)


def test_functions() -> None:
    y, weight, bias = torch.randn_like(X), torch.rand(16), torch.rand(16)
    out = torch.empty_like(X)
    assert torch.equal(functional.silu_mul(X, y, out), F.silu(X) * y) and torch.equal(out, F.silu(X) * y)
    assert torch.equal(functional.gelu_mul(X, y, approximate="tanh"), F.gelu(X, approximate="tanh") * y)
    residual = y.clone()
    found = functional.add_rms_norm(residual, X, weight, None, 1e-6, True)
    assert torch.equal(residual, X + y) and torch.allclose(found, functional.rms_norm(X + y, weight, 1e-6))
    assert torch.allclose(
        functional.add_rms_norm(None, X, weight, bias, 1e-6), functional.rms_norm(X, weight, 1e-6) + bias
    )
    found = functional.fast_layer_norm(X, 16, weight, bias, 1e-5)
    assert torch.allclose(found, F.layer_norm(X, (16,), weight, bias), atol=1e-6)
    found = functional.add_layer_norm(y, X, weight, bias, 1e-5)
    assert torch.allclose(found, F.layer_norm(X + y, (16,), weight, bias), atol=1e-6)
    angles = torch.outer(torch.arange(9).float(), 10000 ** (-torch.arange(0, 8, 2).float() / 8))
    places, heads = torch.arange(4, 9).expand(2, 5), X.view(2, 5, 2, 8)
    for half in (True, False):
        wide = angles.repeat(1, 2) if half else angles.repeat_interleave(2, 1)
        for sin, cos in ((angles.sin(), angles.cos()), (wide.sin(), wide.cos())):
            query, key = functional.rotary_embedding(heads, heads * 2, sin, cos, 8, half, places)
            assert torch.allclose(query[0, 3, 1], rotated(heads[0, 3, 1], 7, half), atol=1e-5)
            assert torch.allclose(key, query * 2, atol=1e-5)
    ends = torch.tensor([0, 3, 7])
    q, k = torch.randn(7, 4, 8), torch.randn(7, 2, 8)
    out = torch.empty_like(q)
    functional.varlen_attention(q, k, k, out, ends, ends, 4, 4, 0.0, 0.5, False, True, False, None)
    alone = F.scaled_dot_product_attention(
        *(t[3:7].transpose(0, 1) for t in (q, k, k)), is_causal=True, scale=0.5, enable_gqa=True
    )
    assert torch.allclose(out[3:7], alone.transpose(0, 1), atol=1e-5)
