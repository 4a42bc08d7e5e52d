"""How much a model suffers from the rounding of each weight: what `allocate` weighs against bytes.

Rounding W [out, in] by D moves the output of its linear by D x. For small moves the Kullback-Leibler divergence of the
model's predictions from what they were is, per token and with g the gradient of log p(label) at that output,

    KL ~ 1/2 E (g D x)^2 ~ 1/2 sum_oi E[g_o^2] E[x_i^2] D_oi^2            rounding errors are as good as independent

where labels are drawn from the model's own predictions, not taken from the text (that would be another matrix). Both
moments come from one backward pass over a few thousand tokens, and every format is then scored without running the
model again; a layer's error counts as the damage it does at the end, so that layers can be compared. Without
gradients, `Moments` with ones for the outputs gives the plain error of the layer's output.

Fused experts [experts, out, in] hide their products, but not their gradients. The label of each token is drawn on its
own, so that gradients of different tokens are independent and have mean 0, and over rows of text

    E (dL/dW_oi)^2 = sum over tokens of E[g_o^2 x_i^2]

whose sums over rows and columns are the two moments of each expert. An expert that no token reached says nothing; it
counts as the mean of the others of its layer, and is named.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lowbit.algorithms.rtn import round_weight
from lowbit.allocate import allocate, byte_budget, stored_bytes
from lowbit.errors import RecipeError
from lowbit.formats import Format
from lowbit.grid import unpack
from lowbit.models.walk import Target, dense_weights, find_targets, is_router, stored_order
from lowbit.progress import Advance

_MATRIX = 2


@dataclass(frozen=True)
class Moments:
    """Of one linear, over tokens: the mean of its squared inputs [in], and of the squared gradients at its outputs [out].

    Of experts [experts, in] and [experts, out], and the numbers of those that no token reached.
    """

    inputs: torch.Tensor
    outputs: torch.Tensor
    idle: tuple[int, ...] = ()


class _Sums:
    """Moments while they are summed up."""

    def __init__(self) -> None:
        self.inputs: Any = 0.0
        self.outputs: Any = 0.0
        self.tokens = 0

    def add_input(self, x: torch.Tensor) -> None:
        flat = x.detach().float().flatten(0, -2)
        self.inputs = self.inputs + flat.square().sum(0)
        self.tokens += len(flat)

    def add_gradient(self, gradient: torch.Tensor) -> None:
        self.outputs = self.outputs + gradient.detach().float().flatten(0, -2).square().sum(0)


class _ExpertSums:
    """The same for a weight of experts, from its gradients."""

    def __init__(self) -> None:
        self.inputs: Any = 0.0
        self.outputs: Any = 0.0

    def add(self, gradient: torch.Tensor) -> None:
        squares = gradient.float().square()
        self.inputs = self.inputs + squares.sum(-2)
        self.outputs = self.outputs + squares.sum(-1)

    def moments(self, tokens: int) -> Moments | None:
        """None where no token reached any of the experts."""
        total = self.inputs.sum(-1, keepdim=True) if isinstance(self.inputs, torch.Tensor) else torch.zeros(1, 1)
        idle = total.squeeze(-1) == 0
        if bool(idle.all()):
            return None
        inputs, outputs = self.inputs / tokens, self.outputs / total
        for values in (inputs, outputs):
            values[idle] = values[~idle].mean(0)
        return Moments(inputs, outputs, tuple(idle.nonzero().flatten().tolist()))


def linear_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """The weights [out, in] of the linears and the head that can be allocated, each once though it may be tied, and those
    of experts [experts, out, in]."""
    found: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for target in _linears(model):
        weight: Any = target.module.weight
        if id(weight) not in seen:
            seen.add(id(weight))
            found[target.path] = stored_order(target, weight.detach())
    for target in _experts(model):
        found |= {f"{target.path}.{suffix}": weight.detach() for suffix, weight in dense_weights(target)}
    return found


def measure_moments(model: nn.Module, rows: Iterable[torch.Tensor], seed: int = 0) -> dict[str, Moments]:
    """The moments of every linear over rows of token ids; linears that saw none (idle experts) are left out."""
    sums = {target.path: _Sums() for target in _linears(model)}
    experts: dict[str, _ExpertSums] = {}
    generator, tokens = torch.Generator().manual_seed(seed), 0
    with (
        _without_weight_gradients(model),
        _listening(model, sums),
        _listening_to_experts(model, experts),
        torch.enable_grad(),
    ):
        for row in rows:
            output = model(row.reshape(1, -1))
            logits = getattr(output, "logits", output).flatten(0, -2).float()
            labels = torch.multinomial(logits.detach().softmax(-1).cpu(), 1, generator=generator).squeeze(-1)
            nn.functional.cross_entropy(logits, labels.to(logits.device), reduction="sum").backward()  # type: ignore[no-untyped-call]
            tokens += len(logits)
    found = {}
    for path, held in sums.items():
        if held.tokens and isinstance(held.outputs, torch.Tensor):
            found[path] = Moments(held.inputs / held.tokens, held.outputs / held.tokens)
    of_experts = {path: own.moments(max(tokens, 1)) for path, own in experts.items()}
    found |= {path: moments for path, moments in of_experts.items() if moments is not None}
    if not found:
        raise RecipeError("no linear of the model was reached: give some rows of token ids to measure on")
    return found


def expected_divergence(weight: torch.Tensor, restored: torch.Tensor, moments: Moments) -> float:
    """What replacing a weight [.., out, in] costs in nats per token."""
    squares = (weight.float() - restored.float()).square()
    by_input = (moments.outputs.unsqueeze(-2) @ squares).squeeze(-2)
    return float((by_input * moments.inputs).sum()) / 2


def allocate_formats(
    weights: Mapping[str, torch.Tensor],
    moments: Mapping[str, Moments],
    formats: Sequence[Format],
    bits_per_weight: float,
    rounder: str = "rtn",
    advance: Advance | None = None,
) -> dict[str, Format]:
    """The format of every module that was measured, so that they have at most so many bits on average, scales included.

    The two weights of a module of experts have one format.
    """
    measured = {name: weight for name, weight in weights.items() if name in moments}
    sizes: dict[str, dict[Format, int]] = {}
    errors: dict[str, dict[Format, float]] = {}
    for name, weight in measured.items():
        path = module_of(name, weight)
        size, error = sizes.setdefault(path, {}), errors.setdefault(path, {})
        for format in formats:
            size[format] = size.get(format, 0) + stored_bytes(format, tuple(weight.shape))
            error[format] = error.get(format, 0.0) + _error(weight, format, moments[name], rounder)
        if advance is not None:
            advance(name)
    shapes = [tuple(weight.shape) for weight in measured.values()]
    budget, least = byte_budget(bits_per_weight, shapes), sum(min(size.values()) for size in sizes.values())
    if least > budget:
        needed = math.ceil(800 * least / sum(map(math.prod, shapes))) / 100
        raise RecipeError(
            f"{bits_per_weight:g} bits a weight are too few: with their scales the smallest formats that are offered need "
            f"{needed:g}; ask for more bits, or name a format with larger groups"
        )
    return allocate(sizes, errors, budget)


def module_of(name: str, weight: torch.Tensor) -> str:
    """The path of the module that has a weight."""
    return name.rpartition(".")[0] if weight.dim() > _MATRIX else name


def _error(weight: torch.Tensor, format: Format, moments: Moments, rounder: str) -> float:
    importance = moments.inputs if rounder == "rtn" and weight.dim() == _MATRIX else None
    packed = round_weight(weight, format, rounder, importance)
    return expected_divergence(weight, unpack(packed), moments)


def _linears(model: nn.Module) -> list[Target]:
    """The linears and the head; a head that is tied to an embedding comes under its own name."""
    return [t for t in find_targets(model) if t.role in ("linear", "head") and not is_router(t.path, t.module)]


def _experts(model: nn.Module) -> list[Target]:
    return [target for target in find_targets(model) if target.role == "experts"]


@contextmanager
def _listening_to_experts(model: nn.Module, sums: dict[str, _ExpertSums]) -> Iterator[None]:
    """The weights of experts tell of their gradients, which are let go at once: never more than one is there."""
    handles: list[Any] = []
    parameters: list[nn.Parameter] = []

    def listen(target: Target, held: _ExpertSums) -> Any:
        def hook(parameter: torch.Tensor) -> None:
            if parameter.grad is not None:
                held.add(stored_order(target, parameter.grad))
            parameter.grad = None

        return hook

    for target in _experts(model):
        for suffix, _ in dense_weights(target):
            parameter = getattr(target.module, suffix).requires_grad_(True)
            parameters.append(parameter)
            sums[f"{target.path}.{suffix}"] = held = _ExpertSums()
            handles.append(parameter.register_post_accumulate_grad_hook(listen(target, held)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter in parameters:
            parameter.requires_grad_(False)


@contextmanager
def _without_weight_gradients(model: nn.Module) -> Iterator[None]:
    """Weights need no gradients here, which would take the room of a second model."""
    wanted = [p for p in model.parameters() if p.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)


@contextmanager
def _listening(model: nn.Module, sums: Mapping[str, _Sums]) -> Iterator[None]:
    """Each linear tells of its inputs, and its outputs tell of their gradients when those come."""

    def listen(held: _Sums) -> Any:
        def hook(_: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            held.add_input(inputs[0])
            # The first linear has nothing before it that needs a gradient: its output starts the graph.
            heard = output if output.requires_grad else output.detach().requires_grad_(True)
            heard.register_hook(held.add_gradient)  # type: ignore[no-untyped-call]
            return heard

        return hook

    handles = [model.get_submodule(path).register_forward_hook(listen(held)) for path, held in sums.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
