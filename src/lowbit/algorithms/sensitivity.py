"""How much a model suffers from the rounding of each weight: what `allocate` weighs against bytes.

Rounding W [out, in] by D moves the output of its linear by D x. For small moves the Kullback-Leibler divergence of the
model's predictions from what they were is, per token and with g the gradient of log p(label) at that output,

    KL ~ 1/2 E (g D x)^2 ~ 1/2 sum_oi E[g_o^2] E[x_i^2] D_oi^2            rounding errors are as good as independent

where labels are drawn from the model's own predictions, not taken from the text (that would be another matrix). Both
moments come from one backward pass over a few thousand tokens, and every format is then scored without running the
model again; a layer's error counts as the damage it does at the end, so that layers can be compared. Without
gradients, `Moments` with ones for the outputs gives the plain error of the layer's output.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lowbit.algorithms.allocate import allocate, byte_budget, stored_bytes
from lowbit.errors import RecipeError
from lowbit.formats import Format
from lowbit.grid import quantize, unpack
from lowbit.models.walk import Target, find_targets, is_router, stored_order
from lowbit.search import SEARCHES


@dataclass(frozen=True)
class Moments:
    """Of one linear, over tokens: the mean of its squared inputs [in], and of the squared gradients at its outputs [out]."""

    inputs: torch.Tensor
    outputs: torch.Tensor


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


def linear_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """The weights [out, in] of the linears and the head that can be allocated, each once though it may be tied."""
    found: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for target in _linears(model):
        weight: Any = target.module.weight
        if id(weight) not in seen:
            seen.add(id(weight))
            found[target.path] = stored_order(target, weight.detach())
    return found


def measure_moments(model: nn.Module, rows: Iterable[torch.Tensor], seed: int = 0) -> dict[str, Moments]:
    """The moments of every linear over rows of token ids; linears that saw none (idle experts) are left out."""
    sums = {target.path: _Sums() for target in _linears(model)}
    generator = torch.Generator().manual_seed(seed)
    with _without_weight_gradients(model), _listening(model, sums), torch.enable_grad():
        for row in rows:
            output = model(row.reshape(1, -1))
            logits = getattr(output, "logits", output).flatten(0, -2).float()
            labels = torch.multinomial(logits.detach().softmax(-1).cpu(), 1, generator=generator).squeeze(-1)
            nn.functional.cross_entropy(logits, labels.to(logits.device), reduction="sum").backward()  # type: ignore[no-untyped-call]
    found = {}
    for path, held in sums.items():
        if held.tokens and isinstance(held.outputs, torch.Tensor):
            found[path] = Moments(held.inputs / held.tokens, held.outputs / held.tokens)
    if not found:
        raise RecipeError("no linear of the model was reached: give some rows of token ids to measure on")
    return found


def expected_divergence(weight: torch.Tensor, restored: torch.Tensor, moments: Moments) -> float:
    """What replacing a weight [out, in] costs in nats per token."""
    squares = (weight.float() - restored.float()).square()
    return float(moments.outputs @ squares @ moments.inputs) / 2


def allocate_formats(
    weights: Mapping[str, torch.Tensor],
    moments: Mapping[str, Moments],
    formats: Sequence[Format],
    bits_per_weight: float,
    rounder: str = "rtn",
) -> dict[str, Format]:
    """The format of every weight that was measured, so that they have at most so many bits on average, scales included."""
    measured = {path: weight for path, weight in weights.items() if path in moments}
    sizes = {path: {f: stored_bytes(f, tuple(w.shape)) for f in formats} for path, w in measured.items()}
    errors = {
        path: {format: _error(weight, format, moments[path], rounder) for format in formats}
        for path, weight in measured.items()
    }
    return allocate(sizes, errors, byte_budget(bits_per_weight, [tuple(w.shape) for w in measured.values()]))


def _error(weight: torch.Tensor, format: Format, moments: Moments, rounder: str) -> float:
    packed = quantize(weight, format, SEARCHES[rounder], moments.inputs if rounder == "rtn" else None)
    return expected_divergence(weight, unpack(packed), moments)


def _linears(model: nn.Module) -> list[Target]:
    """The linears and the head; a head that is tied to an embedding comes under its own name."""
    return [t for t in find_targets(model) if t.role in ("linear", "head") and not is_router(t.path, t.module)]


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
