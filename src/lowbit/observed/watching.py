"""Watching: between what ends each input of each linear lies, over everything that a model is run on.

    low, high [in]      the ends of every input, from which ranges follow for any smoothing
    square [in]         the sum of squares, which tells how much of the signal a range's step is

Nothing is kept of the activations themselves. A range may also come from an observer of the caller's own, a module that is called
with the inputs and has `calculate_qparams`, as those of torch; it sees inputs before any smoothing, so it goes without one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lowbit.errors import RecipeError
from lowbit.interop.qconf_summary import LinearSummary
from lowbit.models.folding import ScalingGroup
from lowbit.models.walk import Target, find_targets, is_router, keeps_dense
from lowbit.observed.smoothing import Fold, FoldedWeights, first_input, place_of, work_out_folds

# Scales of weights as the system has them that the file comes from: the largest weight lies half a step outside.
_WEIGHT_STEPS = 127.5
_STEPS = 255
_MIDDLE = 128
_LEAST = 1e-12


@dataclass
class Seen:
    """What one linear got."""

    low: torch.Tensor
    high: torch.Tensor
    square: torch.Tensor
    rows: int

    def add_(self, x: torch.Tensor) -> None:
        """Take rows [n, in] in."""
        self.low = torch.minimum(self.low, x.amin(0))
        self.high = torch.maximum(self.high, x.amax(0))
        self.square += x.square().sum(0)
        self.rows += len(x)

    @property
    def largest(self) -> torch.Tensor:
        return torch.maximum(self.low.abs(), self.high.abs())


def linear_targets(model: nn.Module) -> dict[str, Target]:
    """The linears of a model that can be packed, by path: the head among them, those that route tokens not."""
    found = [target for target in find_targets(model) if target.role in ("linear", "head")]
    return {t.path: t for t in found if not is_router(t.path, t.module) and not keeps_dense(t.module)}


class Watch:
    """Hooks on every linear of a model, and what they saw. `observer` makes one for each linear, where ranges shall come
    from the caller's own."""

    def __init__(self, model: nn.Module, observer: Callable[[], Any] | None = None) -> None:
        self.model, self.observer = model, observer
        self.seen: dict[str, Seen] = {}
        self.observers: dict[str, Any] = {}
        self._hooks: list[Any] = []
        self._attach()

    def _attach(self) -> None:
        for path, target in linear_targets(self.model).items():
            self._hooks.append(target.module.register_forward_pre_hook(self._hook(path), with_kwargs=True))

    def _hook(self, path: str) -> Callable[..., None]:
        @torch.no_grad()
        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = first_input(args, kwargs)
            rows = x.detach().reshape(-1, x.shape[-1]).float()
            if not len(rows):
                return
            if path not in self.seen:
                zeros = torch.zeros(rows.shape[1], device=rows.device)
                self.seen[path] = Seen(zeros, zeros.clone(), zeros.clone(), 0)
            self.seen[path].add_(rows)
            if self.observer is not None:
                self.observers.setdefault(path, self.observer())(rows)

        return note

    def remove(self) -> None:
        """Take the hooks away; what was seen stays."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Without hooks for a while."""
        self.remove()
        try:
            yield
        finally:
            self._attach()

    def forget_(self) -> None:
        """Begin again."""
        self.seen, self.observers = {}, {}

    def summarize(
        self, alpha: float | None = None, groups: Sequence[ScalingGroup] = (), left: Sequence[str] = ()
    ) -> list[LinearSummary]:
        """What was seen of each linear. With an alpha the groups are smoothed; linears of `left` stay in full precision."""
        if not self.seen:
            raise RecipeError("the prepared model has not been run yet: run it on some samples first (calibration)")
        kept = [group for group in groups if not set(group.consumers) & set(left)]
        largest = {path: seen.largest for path, seen in self.seen.items()}
        folds = [] if alpha is None else work_out_folds(self.model, kept, largest, alpha)
        weights = FoldedWeights(self.model, folds)
        by_path = {path: fold for fold in folds for path in fold.group.linears}
        return [
            self._summarize(path, weights.read(path), by_path.get(path), path in left)
            for path in linear_targets(self.model)
        ]

    def _summarize(self, path: str, weight: torch.Tensor, fold: Fold | None, is_left: bool) -> LinearSummary:
        scales = tuple((weight.abs().amax(1).clamp_min(_LEAST) / _WEIGHT_STEPS).tolist())
        step, zero = self._input_grid(path, fold)
        noise = self._noise(path, fold, step)
        if fold is None:
            return LinearSummary(path, step, zero, scales, is_left=is_left, noise=noise)
        factors, place = tuple(fold.scale.tolist()), place_of(fold.group)
        return LinearSummary(path, step, zero, scales, factors, place, is_left, noise)

    def _input_grid(self, path: str, fold: Fold | None) -> tuple[float | None, int]:
        """The step of a linear's inputs and the code of zero; no step where nothing but zeros was seen."""
        seen = self.seen.get(path)
        if seen is None or not bool(seen.largest.any()):
            return None, 0
        if path in self.observers and fold is None:
            step, zero = (value.reshape(-1)[0].item() for value in self.observers[path].calculate_qparams())
            signed = getattr(self.observers[path], "dtype", None) == torch.qint8
            return float(step), int(zero) + (_MIDDLE if signed else 0)
        factor = 1.0 if fold is None else fold.scale.to(seen.low.device)
        low, high = float((seen.low / factor).amin()), float((seen.high / factor).amax())
        step = max((high - low) / _STEPS, _LEAST)
        return step, round(-low / step)

    def _noise(self, path: str, fold: Fold | None, step: float | None) -> float | None:
        """How much of the signal of a linear's inputs is lost in the steps of its range: step^2 / 12 to their mean square."""
        seen = self.seen.get(path)
        if seen is None or step is None:
            return None
        factor = 1.0 if fold is None else fold.scale.to(seen.square.device)
        mean = float((seen.square / factor**2).mean()) / seen.rows
        return step**2 / 12 / max(mean, _LEAST)
