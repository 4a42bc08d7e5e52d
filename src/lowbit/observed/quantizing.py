"""From a summary to a model: smoothing folded, weights to 8 bits, every linear with the range that was observed.

A linear whose inputs are too small for the steps of their range (a few huge ones make it wide) gets a scale for each row instead:
the products are the same integers, and the report says which.

A summary belongs to the weights that it was made on. So it is held against the model first, layer by layer: paths, sides, and the
scale of every row of a weight, which no other training gives. The first layer that differs is named.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from lowbit.checkpoint.layout import held_weights
from lowbit.errors import CheckpointError, RecipeError, nearest
from lowbit.formats import as_format
from lowbit.interop.qconf_summary import LinearSummary
from lowbit.models.folding import ScalingGroup
from lowbit.observed.smoothing import Fold, FoldedWeights, fold_, folds_of
from lowbit.observed.watching import linear_targets
from lowbit.optimize import settle_
from lowbit.quantize import quantize_
from lowbit.recipe import Recipe
from lowbit.report import Report

DYNAMIC, STATIC = as_format("w8a8"), as_format("w8a8_static")
# How far the mean scale of a weight's rows may lie from the one in a summary. bf16 instead of fp32 moves it by less than 0.01.
_SAME_SCALES = 0.05
_WEIGHT_STEPS = 127.5
# Where the steps of a range lose more of the signal than this, each row gets a scale of its own. SmolLM2 smoothed with an alpha of
# 0.5 is at a KL of 0.181 with ranges alone and at 0.057 with 9 of its 211 linears (down projections) by rows; at 0.076 with a limit
# of 0.03, 0.049 with 0.003, and 0.010 if none has a range.
_MOST_NOISE = 0.01
_NOISY = "the steps of its range would lose {:.1%} of its input, so each row of it has its own scale"
_ROWS = "each row of its input has its own scale"
_UNSEEN = "nothing but zeros was seen at its input, so each row has its own scale"
_UNPLACED = "its smoothing folds into no weight, so each row of its input has its own scale"


def check_summary(model: nn.Module, linears: Sequence[LinearSummary]) -> list[Fold]:
    """Refuse a summary of another model, naming the layer that differs; the folds that it asks for."""
    targets = linear_targets(model)
    for linear in linears:
        if linear.path not in targets:
            known = nearest(linear.path, targets) if targets else "it has no linears"
            raise CheckpointError(f"the summary is of another model: {linear.path} is not in this one ({known})")
    named = {linear.path for linear in linears}
    absent = next((path for path, target in targets.items() if path not in named and target.role == "linear"), None)
    if absent is not None:
        raise CheckpointError(f"the summary is of another model: it says nothing of {absent}")
    folds = folds_of(model, linears)
    for linear in linears:
        _check_sides(model, linear)
    weights = FoldedWeights(model, folds)
    for linear in linears:
        _check_scales(linear, weights.read(linear.path))
    return folds


def _check_sides(model: nn.Module, linear: LinearSummary) -> None:
    rows, inputs = FoldedWeights(model, ()).read(linear.path).shape
    for name, said, found in (("outputs", len(linear.weight_scales), rows), ("inputs", len(linear.factors), inputs)):
        if said and said != found:
            raise CheckpointError(
                f"the summary is of another model: {linear.path} has {said} {name} there and {found} in this one"
            )


def _check_scales(linear: LinearSummary, weight: torch.Tensor) -> None:
    """Scales of smoothed weights are only compared where the smoothing is known to fold."""
    if not linear.weight_scales or (linear.factors and linear.place is None):
        return
    said = torch.tensor(linear.weight_scales, device=weight.device)
    found = weight.abs().amax(1) / _WEIGHT_STEPS
    apart = float((said - found).abs().mean() / found.mean().clamp_min(1e-12))
    if apart > _SAME_SCALES:
        raise CheckpointError(
            f"the summary is of another model: the weights of {linear.path} are others than those that were calibrated "
            f"(their scales differ by {apart:.0%})"
        )


def quantize_from_summary_(
    model: nn.Module,
    linears: Sequence[LinearSummary],
    groups: Sequence[ScalingGroup] = (),
    recipe: Recipe | None = None,
    ranges: bool = True,
) -> Report:
    """Make the linears of a model w8a8_static as a summary says, in place. `groups`: those of the model, for a summary that
    does not say where its smoothing folds. `recipe` may say what becomes of other weights (convolutions). Without `ranges` only
    the smoothing is taken, and the ranges that were edited by hand: every other linear is w8a8, each row of its input has a scale
    of its own."""
    if held_weights(model):
        raise RecipeError("the model is low-bit already: quantise the one in full precision that was calibrated")
    check_summary(model, linears)
    folds = folds_of(model, linears, groups)
    fold_(model, folds)
    smoothed = {path for fold in folds for path in fold.group.linears}
    recipe = _recipe(linears, recipe)
    report = quantize_(model, recipe, False, prepare=False)
    rows = {row.path: row for row in report.layers}
    weights = {held.path: held.weight for held in held_weights(model)}
    for linear in linears:
        row = rows.get(linear.path)
        if linear.is_left or linear.path not in weights:
            continue
        reason = _why_by_rows(linear, linear.path in smoothed) if ranges or linear.is_edited else _ROWS
        if not reason:
            assert linear.input_range is not None
            weight, ends = weights[linear.path], linear.input_range
            given = torch.tensor(ends, device=weight.device)
            weight.set_packed_(replace(weight.packed(), format=STATIC, input_range=given))
            reason = f"inputs from {ends[0]:.4g} to {ends[1]:.4g}"
        if row is not None:
            row.format = weights[linear.path].format.name
            smooth = "smoothed" if linear.path in smoothed else ""
            row.note = "; ".join(text for text in (row.note, smooth, reason) if text)
    settle_(model, report, recipe)
    return report


def _why_by_rows(linear: LinearSummary, is_smoothed: bool) -> str:
    """Why a linear has no fixed range, or nothing."""
    if linear.input_range is None:
        return _UNSEEN
    if linear.factors and not is_smoothed:
        return _UNPLACED
    if linear.is_edited:
        return ""
    return _NOISY.format(linear.noise) if (linear.noise or 0) > _MOST_NOISE else ""


def _recipe(linears: Sequence[LinearSummary], recipe: Recipe | None) -> Recipe:
    """8 bits for what the summary names, full precision for what it leaves."""
    left = tuple((f"^{re.escape(linear.path)}$", None) for linear in linears if linear.is_left)
    base = recipe or Recipe(DYNAMIC, head=DYNAMIC, name="w8a8 from a summary")
    return base.replace(overrides=(*left, *base.overrides))
