"""What the names of `ipex.llm.modules` compute, in plain torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from lowbit.compat.faces.intel_extension_for_pytorch.llm.functional import _plain
from lowbit.compat.missing import refuse_unknown
from lowbit.compat.names import WORKS, Name
from lowbit.errors import RecipeError


class _After(nn.Module):
    """A linear, and a function of what it gives and of further inputs."""

    function: Callable[..., torch.Tensor]

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        return type(self).function(self.linear(x), *others)


class LinearSilu(_After):
    function = F.silu


class LinearRelu(_After):
    function = F.relu


class LinearGelu(_After):
    function = F.gelu


class LinearNewGelu(_After):
    @staticmethod
    def function(y: torch.Tensor) -> torch.Tensor:
        return F.gelu(y, approximate="tanh")


class LinearSiluMul(_After):
    @staticmethod
    def function(y: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return F.silu(y) * other


class LinearMul(_After):
    @staticmethod
    def function(y: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return y * other


class LinearAdd(_After):
    @staticmethod
    def function(y: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return y + other


class LinearAddAdd(_After):
    @staticmethod
    def function(y: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        return y + first + second


class Linear2SiluMul(nn.Module):
    """silu(linear_s(x)) * linear_m(x)."""

    def __init__(self, linear_s: nn.Module, linear_m: nn.Module) -> None:
        super().__init__()
        self.linear_1, self.linear_2 = linear_s, linear_m

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = F.silu(self.linear_1(x)) * self.linear_2(x)
        return y


class RMSNorm(nn.Module):
    """x / rms(x) * weight."""

    def __init__(self, hidden_size: int, eps: float = 1e-6, weight: torch.Tensor | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size) if weight is None else weight.detach().clone())
        self.variance_epsilon = eps

    @classmethod
    def apply_function(cls, hidden_states: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return _plain.rms_norm(hidden_states, weight, eps)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return _plain.rms_norm(hidden_states, self.weight, self.variance_epsilon)


class FastLayerNorm(nn.Module):
    """torch's layer norm with the weight and bias of another."""

    def __init__(
        self, normalized_shape: Any, eps: float, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> None:
        super().__init__()
        self.normalized_shape, self.eps, self.weight, self.bias = normalized_shape, eps, weight, bias

    @classmethod
    def apply_function(
        cls, hidden_states: torch.Tensor, normalized_shape: Any, weight: torch.Tensor, bias: Any, eps: float
    ) -> torch.Tensor:
        return _plain.fast_layer_norm(hidden_states, normalized_shape, weight, bias, eps)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return _plain.fast_layer_norm(hidden_states, self.normalized_shape, self.weight, self.bias, self.eps)


class RotaryEmbedding(nn.Module):
    """Positions turned into a tensor of heads [batch, tokens, heads, head_dim]."""

    def __init__(
        self,
        max_position_embeddings: int,
        pos_embd_dim: int,
        base: float = 10000,
        backbone: str | None = None,
        extra_rope_config: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if extra_rope_config:
            raise RecipeError(
                "lowbit's RotaryEmbedding has no extra_rope_config: transformers' own rotary embedding of the model has them"
            )
        frequencies = 1.0 / base ** (torch.arange(0, pos_embd_dim, 2).float() / pos_embd_dim)
        angles = torch.outer(torch.arange(max_position_embeddings).float(), frequencies)
        self.sin: torch.Tensor
        self.cos: torch.Tensor
        self.register_buffer("sin", angles.sin(), persistent=False)
        self.register_buffer("cos", angles.cos(), persistent=False)

    @classmethod
    def apply_function(cls, *args: Any) -> Any:
        return _plain.rotary_embedding(*args)

    def forward(
        self,
        x: torch.Tensor,
        position_ids: torch.Tensor,
        num_head: int,
        head_dim: int,
        offset: int,
        rotary_ndims: int,
        seq_len: int | None = None,
        num_concats: int | None = None,
    ) -> torch.Tensor:
        if num_concats is not None:
            raise RecipeError("lowbit's RotaryEmbedding turns one tensor: split a fused query, key and value first")
        heads = x.view(*x.shape[:2], num_head, head_dim)
        half = offset != 1
        sin, cos = self.sin[position_ids], self.cos[position_ids]
        return _plain.turn(heads, sin, cos, rotary_ndims, half)


class VarlenAttention(nn.Module):
    """Sequences of different lengths one after another, each attending to itself; the answer goes into `out`."""

    @classmethod
    def apply_function(cls, *args: Any) -> torch.Tensor:
        return _plain.varlen_attention(*args)

    def forward(self, *args: Any) -> torch.Tensor:
        return _plain.varlen_attention(*args)


__getattr__ = refuse_unknown(__name__, {})

_PLACE = "intel_extension_for_pytorch.llm.modules"
_TEST = "tests/unit/test_compat_ipex_modules.py::test_modules"
_CLASSES = (
    LinearSilu, LinearRelu, LinearGelu, LinearNewGelu, LinearSiluMul, LinearMul, LinearAdd, LinearAddAdd, Linear2SiluMul,
    RMSNorm, FastLayerNorm, RotaryEmbedding, VarlenAttention,
)  # fmt: skip
NAMES = tuple(Name(f"{_PLACE}.{kind.__name__}", "", WORKS, _TEST, "plain torch") for kind in _CLASSES)
