"""The low-bit modules: ordinary modules over integer buffers, one class for all formats and devices.

    PackedWeight     one packed weight, its kernel, its buffers: what all the others are made of
    LowBitLinear     takes the place of nn.Linear (and is one, so that peft and transformers treat it as such)
    LowBitEmbedding  takes the place of nn.Embedding: rows are unpacked as they are looked up
    LowBitConv       takes the place of nn.Conv1d/2d/3d: packed as [out, in * kernel], unpacked per call
    LowBitExperts    takes the place of the fused experts of transformers 5: 3-D weights [experts, out, in]

A PackedWeight holds one form at a time: the canonical buffers of PackedTensor, or what its kernel prepared from them.
`packed()` gives the canonical form whichever it is, the state dict always holds it, and moving to another device goes
through it. Buffers keep their types: `.half()` or `.to(torch.bfloat16)` on a model changes what it computes in, never
what is stored. A head tied to its embedding is a LowBitLinear over the same PackedWeight, so tied weights are stored
once.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Self

import torch
from torch import nn

from lowbit.formats import Format
from lowbit.grid import check_finite, quantize, unpack
from lowbit.kernels.autograd import is_recorded, look_up, multiply, multiply_experts
from lowbit.kernels.table import Kernel, choose
from lowbit.packing import BUFFERS, PackedTensor
from lowbit.search import Search


class PackedWeight(nn.Module):
    """One packed weight [out, in] or [experts, out, in], and the kernel that reads it."""

    format: Format
    shape: tuple[int, ...]

    def __init__(self, packed: PackedTensor, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.format, self.shape = packed.format, packed.shape
        self.dtype = dtype
        self.compute = "auto"
        self.kernel: Kernel | None = None
        self._replace_buffers(packed.tensors())

    def _replace_buffers(self, tensors: dict[str, torch.Tensor]) -> None:
        self._buffers.clear()
        self._non_persistent_buffers_set.clear()
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor, persistent=name in BUFFERS)

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """The buffers as they are held now: canonical, or prepared by the kernel."""
        return {name: tensor for name, tensor in self._buffers.items() if tensor is not None}

    @property
    def device(self) -> torch.device:
        return next(iter(self.tensors.values())).device

    def packed(self) -> PackedTensor:
        """The weight in canonical form."""
        if self.kernel is None:
            return PackedTensor(self.format, self.shape, **self.tensors)
        return self.kernel.restore(self.tensors, self.format, self.shape)

    def set_packed_(self, packed: PackedTensor) -> None:
        """Hold another weight, in canonical form."""
        self.format, self.shape, self.kernel = packed.format, packed.shape, None
        self._replace_buffers(packed.tensors())

    def prepare_(self, kernel: str | None = None) -> None:
        """Choose the kernel for the device that the weight is on, and bring the weight into its form."""
        packed = self.packed()
        row = choose(self.format, self.shape, self.device.type, self.compute, kernel)
        self._replace_buffers(row.prepare(packed))
        self.kernel = row

    def restore_(self) -> None:
        """Back to the canonical form."""
        if self.kernel is not None:
            self.set_packed_(self.packed())

    def dense(self) -> torch.Tensor:
        """The weight unpacked, in the type that the model computes in."""
        if (
            is_recorded() and len(self.shape) == 2
        ):  # what unpacks it is no operation of torch; looking all rows up is one
            return self.rows(torch.arange(self.shape[0], device=self.device))
        return unpack(self.packed(), self.dtype)

    def set_dense_(self, weight: torch.Tensor) -> None:
        """Hold another weight, rounded into the format of the one before."""
        check_finite(weight, "the new weight")
        prepared = self.kernel is not None
        packed = quantize(weight.detach().reshape(self.shape).float(), self.format, Search())
        self.set_packed_(replace(packed, input_range=self.tensors.get("input_range")))
        if prepared:
            self.prepare_()

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows of a weight [out, in], in the type that the model computes in."""
        kernel = self._ready()
        return look_up(ids, self.tensors, kernel, self.format, self.shape).to(self.dtype)

    def experts(self, x: torch.Tensor, begins: torch.Tensor) -> torch.Tensor:
        """Rows of x sorted by expert, each times its own matrix of a weight [experts, out, in]."""
        kernel = self._ready()
        return multiply_experts(x, begins, self.tensors, kernel, self.format.name, self.shape, self.compute)

    def _ready(self) -> Kernel:
        if self.kernel is None:
            self.prepare_()
        assert self.kernel is not None
        return self.kernel

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kernel = self._ready()
        return multiply(x, self.tensors, kernel, self.format.name, self.shape, self.compute)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        """Follow the model to another device, but keep the stored types whatever type the model is cast to."""
        probe = fn(torch.empty(0, device=self.device, dtype=self.dtype))
        self.dtype = probe.dtype
        if probe.device != self.device:
            prepared = self.kernel is not None
            self.restore_()
            self._replace_buffers({n: fn(t.view(torch.uint8)).view(t.dtype) for n, t in self.tensors.items()})
            if prepared and probe.device.type != "meta":
                self.prepare_()
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        for name, tensor in self.packed().tensors().items():
            destination[prefix + name] = tensor if keep_vars else tensor.detach()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        prepared = self.kernel is not None
        self.restore_()
        super()._load_from_state_dict(state_dict, prefix, *rest)
        if prepared:
            self.prepare_()

    def extra_repr(self) -> str:
        kernel = self.kernel.name if self.kernel else "not chosen yet"
        return f"{self.format}, shape={list(self.shape)}, kernel={kernel}"


class Unpacked(torch.Tensor):
    """A packed weight as it reads unpacked, an ordinary tensor but for one thing: what is put into its `data` is packed.

    That is how peft merges an adapter (`weight.data += update`), and it knows no other way for layers that are not its own.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    held: PackedWeight

    @classmethod
    def read(cls, held: PackedWeight, shape: tuple[int, ...] | None = None) -> Unpacked:
        weight = held.dense().view(shape or held.shape).as_subclass(cls)
        weight.held = held
        return weight

    @property
    def data(self) -> torch.Tensor:
        return self.detach().as_subclass(torch.Tensor)

    @data.setter
    def data(self, weight: torch.Tensor) -> None:
        warnings.warn(
            f"a merged weight is rounded to {self.held.format.name} again: dequantize() the model first for an exact sum",
            stacklevel=3,
        )
        self.held.set_dense_(weight)


class LowBitLinear(nn.Linear):
    """y = x W^T + b over a packed weight."""

    def __init__(self, packed_weight: PackedWeight, bias: torch.Tensor | None = None) -> None:
        nn.Module.__init__(self)
        self.packed_weight = packed_weight
        self.out_features, self.in_features = packed_weight.shape
        self.register_parameter("bias", _frozen(bias))

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """The weight unpacked, made anew at each read: what is written into it is lost, what its `data` is set to is packed."""
        return Unpacked.read(self.packed_weight)

    def reset_parameters(self) -> None:
        """A packed weight has no random start."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.packed_weight(x)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class LowBitEmbedding(nn.Embedding):
    """Rows of a packed weight [entries, width], unpacked as they are looked up."""

    def __init__(self, packed_weight: PackedWeight, padding_idx: int | None = None, scale: float = 1.0) -> None:
        nn.Module.__init__(self)
        self.packed_weight = packed_weight
        self.num_embeddings, self.embedding_dim = packed_weight.shape
        self.padding_idx = padding_idx
        self.max_norm, self.norm_type = None, 2.0
        self.scale_grad_by_freq, self.sparse = False, False
        self.scale = scale

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """The table unpacked, made anew at each read: what is written into it is lost, what its `data` is set to is packed."""
        return Unpacked.read(self.packed_weight)

    def reset_parameters(self) -> None:
        """A packed weight has no random start."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        values = self.packed_weight.rows(ids.flatten()).view(*ids.shape, self.embedding_dim)
        # Rounded to the type of the values first, as the models do that scale their embedding.
        return values if self.scale == 1.0 else values * values.new_tensor(self.scale)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}"


_CONVOLUTIONS: dict[type[nn.Module], Callable[..., torch.Tensor]] = {
    nn.Conv1d: nn.functional.conv1d,
    nn.Conv2d: nn.functional.conv2d,
    nn.Conv3d: nn.functional.conv3d,
}


class LowBitConv(nn.Module):
    """A convolution whose weight [out, in / groups, *kernel] is packed as rows of in / groups * prod(kernel) weights."""

    def __init__(self, packed_weight: PackedWeight, conv: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> None:
        super().__init__()
        self.packed_weight = packed_weight
        self.bias = conv.bias
        self.weight_shape = tuple(conv.weight.shape)
        self.functional = next(function for kind, function in _CONVOLUTIONS.items() if isinstance(conv, kind))
        self.options = {
            "stride": conv.stride,
            "padding": conv.padding,
            "dilation": conv.dilation,
            "groups": conv.groups,
        }
        self.pads = conv._reversed_padding_repeated_twice if conv.padding_mode != "zeros" else None
        self.padding_mode = conv.padding_mode

    @property
    def weight(self) -> torch.Tensor:
        """The weight unpacked, made anew at each read: what is written into it is lost, what its `data` is set to is packed."""
        return Unpacked.read(self.packed_weight, self.weight_shape)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        options = dict(self.options)
        if self.pads is not None:
            x = nn.functional.pad(x, self.pads, mode=self.padding_mode)
            options["padding"] = 0
        y: torch.Tensor = self.functional(
            x, self.packed_weight.dense().view(self.weight_shape).to(x.dtype), self.bias, **options
        )
        return y

    def extra_repr(self) -> str:
        return f"weight={list(self.weight_shape)}, " + ", ".join(f"{k}={v}" for k, v in self.options.items())


class LowBitExperts(nn.Module):
    """The experts of a mixture, as transformers 5 fuses them: one 3-D weight for gate and up, one for down.

    Tokens are sorted by expert, and one call multiplies all of them, each by its own expert, so that a weight is read
    once for all its tokens. `apply_gate` is the original module's own function from the first product to the input of
    the second, so that every family's activation is kept.
    """

    def __init__(
        self,
        up: PackedWeight,
        down: PackedWeight,
        apply_gate: Callable[[torch.Tensor], torch.Tensor],
        up_bias: torch.Tensor | None = None,
        down_bias: torch.Tensor | None = None,
        up_name: str = "gate_up_proj",
    ) -> None:
        super().__init__()
        self.up_name = up_name
        self.add_module(up_name, up)
        self.down_proj = down
        self.num_experts = up.shape[0]
        self.apply_gate = apply_gate
        self.register_parameter(f"{up_name}_bias", _frozen(up_bias))
        self.register_parameter("down_proj_bias", _frozen(down_bias))

    def forward(self, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        """hidden [tokens, width], top_k_index and top_k_weights [tokens, k] -> [tokens, width]."""
        chosen = top_k_index.flatten()
        order = torch.argsort(chosen, stable=True)
        # An index past the last marks a token that stays on another rank: sorted to the end, it belongs to no expert.
        counts = (chosen[None] == torch.arange(self.num_experts, device=chosen.device)[:, None]).sum(1)
        begins = nn.functional.pad(counts.cumsum(0), (1, 0))
        token, expert = order // top_k_index.shape[-1], chosen[order]
        inner = self.apply_gate(self._product(self.up_name, expert, hidden[token], begins))
        outer = self._product("down_proj", expert, inner, begins)
        share = torch.where(expert < self.num_experts, top_k_weights.flatten()[order], 0.0)
        return torch.zeros_like(hidden).index_add_(0, token, (outer * share[:, None]).to(hidden.dtype))

    def _product(self, name: str, expert: torch.Tensor, x: torch.Tensor, begins: torch.Tensor) -> torch.Tensor:
        held: PackedWeight = getattr(self, name)
        bias = getattr(self, f"{name}_bias")
        y = held.experts(x, begins)
        return y if bias is None else y + bias[expert.clamp_max(self.num_experts - 1)].to(y.dtype)

    def extra_repr(self) -> str:
        return f"experts={self.num_experts}"


def _frozen(bias: torch.Tensor | None) -> nn.Parameter | None:
    """A bias as it is, the same object: masked language models tie that of the head to another parameter."""
    if isinstance(bias, nn.Parameter):
        bias.requires_grad_(False)
        return bias
    return None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)


def packed_weights(model: nn.Module) -> dict[str, PackedWeight]:
    """Every packed weight of a model by path, tied ones once."""
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedWeight)}


def prepare_(model: nn.Module, kernel: str | None = None) -> None:
    """Choose the kernel of every packed weight of a model."""
    for held in packed_weights(model).values():
        held.prepare_(kernel)
