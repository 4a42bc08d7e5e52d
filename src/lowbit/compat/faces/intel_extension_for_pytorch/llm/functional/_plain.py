"""What the names of `ipex.llm.functional` compute, in plain torch."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch.nn import functional as F

from lowbit.compat.missing import refuse_unknown
from lowbit.compat.names import WORKS, Name


def silu_mul(x: torch.Tensor, y: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """silu(x) * y."""
    return torch.mul(F.silu(x), y, out=out)


def gelu_mul(
    x: torch.Tensor, y: torch.Tensor, out: torch.Tensor | None = None, approximate: str = "none"
) -> torch.Tensor:
    """gelu(x) * y."""
    return torch.mul(F.gelu(x, approximate=approximate), y, out=out)


def rms_norm(hidden_states: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return F.rms_norm(hidden_states, weight.shape, weight.to(hidden_states.dtype), eps)


def fast_layer_norm(
    hidden_states: torch.Tensor, normalized_shape: Any, weight: torch.Tensor, bias: torch.Tensor | None, eps: float
) -> torch.Tensor:
    shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
    return F.layer_norm(hidden_states, shape, weight, bias, eps)


def add_rms_norm(
    residual: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    add_back: bool = False,
) -> torch.Tensor:
    """The norm of x + residual; with `add_back` the sum is written into residual."""
    y = rms_norm(_added(residual, x, add_back), weight, eps)
    return y if bias is None else y + bias


def add_layer_norm(
    residual: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    add_back: bool = False,
) -> torch.Tensor:
    """The layer norm of x + residual; with `add_back` the sum is written into residual."""
    return fast_layer_norm(_added(residual, x, add_back), weight.shape, weight, bias, eps)


def _added(residual: torch.Tensor | None, x: torch.Tensor, add_back: bool) -> torch.Tensor:
    if residual is None:
        return x
    total = residual + x
    if add_back:
        residual.copy_(total)
    return total


def rotary_embedding(
    query: torch.Tensor,
    key: torch.Tensor,
    sin: torch.Tensor,
    cos: torch.Tensor,
    rotary_dim: int,
    rotary_half: bool,
    position_ids: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Query and key [.., tokens, heads, head_dim] with positions turned in; sin and cos [positions, rotary_dim] or half of it."""
    if position_ids is not None and sin.dim() == 2 and position_ids.dim() == 2:
        sin, cos = sin[position_ids], cos[position_ids]
    return turn(query, sin, cos, rotary_dim, rotary_half), turn(key, sin, cos, rotary_dim, rotary_half)


def turn(heads: torch.Tensor, sin: torch.Tensor, cos: torch.Tensor, rotary_dim: int, half: bool) -> torch.Tensor:
    """Pairs of channels turned by angles [.., tokens, rotary_dim / 2]: neighbours, or (half) those half a head apart."""
    pairs = rotary_dim // 2
    if sin.shape[-1] == rotary_dim:  # written out for both of a pair
        sin, cos = (t[..., :pairs] if half else t[..., ::2] for t in (sin, cos))
    sin, cos = sin.unsqueeze(-2).to(heads.dtype), cos.unsqueeze(-2).to(heads.dtype)
    turned, rest = heads[..., :rotary_dim], heads[..., rotary_dim:]
    a, b = (turned[..., :pairs], turned[..., pairs:]) if half else (turned[..., ::2], turned[..., 1::2])
    first, second = a * cos - b * sin, b * cos + a * sin
    joined = torch.cat([first, second], -1) if half else torch.stack([first, second], -1).flatten(-2)
    return torch.cat([joined, rest], -1)


def varlen_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    seqlen_q: torch.Tensor,
    seqlen_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    pdropout: float = 0.0,
    softmax_scale: float | None = None,
    zero_tensors: bool = False,
    is_causal: bool = True,
    return_softmax: bool = False,
    gen_: Any = None,
) -> torch.Tensor:
    """Sequences [tokens, heads, head_dim] one after another, each attending to itself; begins in seqlen_q and seqlen_k."""
    for (q0, q1), (k0, k1) in zip(pairwise(seqlen_q.tolist()), pairwise(seqlen_k.tolist()), strict=True):
        q, k, v = (t.transpose(0, 1) for t in (query[q0:q1], key[k0:k1], value[k0:k1]))
        found = F.scaled_dot_product_attention(
            q, k, v, dropout_p=pdropout, is_causal=is_causal, scale=softmax_scale, enable_gqa=q.shape[0] != k.shape[0]
        )
        out[q0:q1] = found.transpose(0, 1)
    return out


__getattr__ = refuse_unknown(__name__, {})

_PLACE = "intel_extension_for_pytorch.llm.functional"
_TEST = "tests/unit/test_compat_ipex_modules.py::test_functions"
_FUNCTIONS = (
    silu_mul, gelu_mul, rms_norm, fast_layer_norm, add_rms_norm, add_layer_norm, rotary_embedding, varlen_attention,
)  # fmt: skip
NAMES = tuple(Name(f"{_PLACE}.{function.__name__}", "", WORKS, _TEST, "plain torch") for function in _FUNCTIONS)
