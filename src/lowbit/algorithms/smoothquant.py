"""SmoothQuant: share the range of activations and weights (arXiv 2211.10438).

    s = (max |x|)^alpha / (max |W|)^(1 - alpha)        per input; max over the rows of all linears that share it

An input that is always zero keeps s = 1. alpha = 0.5 suits many models and no model best: `search` gives every group of
linears the alpha with the least error of its parent's output, weights and activations rounded as the recipe rounds
them, and no scale at all is among the candidates. A fixed alpha is taken as it is.
"""

from __future__ import annotations

import torch

from lowbit.algorithms.table import BlockWork
from lowbit.algorithms.trials import Trial, scale_groups_
from lowbit.options import SmoothQuantOptions

_LEAST = 1e-5


def scale_by_smoothquant_(work: BlockWork, options: SmoothQuantOptions) -> dict[str, str]:
    """Fold a scale into each group of the block. Gives a note for each linear."""

    def search(trial: Trial) -> tuple[torch.Tensor | None, str]:
        if not options.search:
            return smooth(trial, options.alpha), f"alpha {options.alpha:g}"
        return search_alpha(trial, options)

    return scale_groups_(work, "smoothquant", options.tokens, search)


def smooth(trial: Trial, alpha: float) -> torch.Tensor:
    """The scale [in] of an alpha."""
    largest = trial.statistics.largest
    weights = torch.stack([weight.flatten(0, -2).abs().amax(0) for weight in trial.weights.values()]).amax(0)
    scale = largest.clamp_min(_LEAST).pow(alpha) / weights.clamp_min(_LEAST).pow(1 - alpha)
    return trial.group.tie(torch.where(largest == 0, torch.ones_like(scale), scale.clamp_min(_LEAST)))


def search_alpha(trial: Trial, options: SmoothQuantOptions) -> tuple[torch.Tensor | None, str]:
    """The scale of the best alpha, None where no scale is the best, and its name."""
    best, best_loss, name = None, trial.loss(None), "no scale is better than none"
    for step in range(options.steps + 1):
        alpha = options.lowest + (options.highest - options.lowest) * step / options.steps
        scale = smooth(trial, alpha)
        loss = trial.loss(scale)
        if loss < best_loss:
            best, best_loss, name = scale, loss, f"alpha {alpha:g}"
    return best, name
