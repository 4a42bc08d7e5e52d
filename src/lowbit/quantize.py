"""The driver: model and recipe in, the same model with low-bit modules out, and a report of every weight.

Without calibration tokens weights are packed one at a time in the order of the model, and each dense weight is let go
before the next is read: the room needed is that of one weight. With them the blocks of the model go first, one at a
time (see `blockwise`); what lies outside them (the head, the embedding) is rounded to nearest.
"""

from __future__ import annotations

import re
import time
import warnings
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from lowbit.algorithms import ROUNDERS
from lowbit.algorithms.rtn import floored, relative_error, round_weight
from lowbit.algorithms.sensitivity import Moments, allocate_formats, linear_weights, measure_moments, module_of
from lowbit.allocate import OFFERED_BITS
from lowbit.blockwise import Chosen, Where, check_data, describe_packed, round_in_blocks_
from lowbit.calibration import Calibration, fitting
from lowbit.errors import RecipeError
from lowbit.formats import Format, format_from_name
from lowbit.grid import check_finite
from lowbit.layers import PackedWeight, packed_weights, prepare_
from lowbit.models.walk import Target, dense_weights, find_targets, is_router, keeps_dense
from lowbit.packing import PackedTensor
from lowbit.progress import counted, progress
from lowbit.recipe import OVERRIDES_OF_RECIPES, Choice, Recipe
from lowbit.report import Report, Skipped
from lowbit.swap import low_bit_module, replace_module

# Windows of calibration text on which sensitivities are measured, forward and backward.
MEASURED_WINDOWS = 32
# More idle experts than this are counted in the report instead of being named.
_MOST_NAMED = 8


def quantize_(
    model: nn.Module,
    recipe: Recipe,
    show_progress: bool | None = None,
    prepare: bool = True,
    calibration: Calibration | None = None,
    where: Where | None = None,
) -> Report:
    """Pack the weights of a model in place as a recipe says, on calibration tokens if it asks for them."""
    start = time.perf_counter()
    check_data(recipe, calibration)
    calibration = None if calibration is None else fitting(calibration, _positions(model))
    report = Report(recipe=recipe.title)
    _check_numbers(model)
    targets = find_targets(model)
    if targets and targets[0].path == "":
        kind = type(model).__name__
        raise RecipeError(f"a lone {kind} has nothing to be replaced in: wrap it, for example in nn.Sequential(layer)")
    held: dict[str, list[PackedWeight]] = {}
    plans = {target.path: plan(target, targets, recipe) for target in targets}
    with progress("packing", len(targets), show_progress) as advance, torch.no_grad():
        done: set[str] = set()
        if calibration is not None:
            chosen = _for_blocks(targets, plans)
            report.layers += round_in_blocks_(model, chosen, recipe, calibration, where or Where(), advance)
            done = {target.path for target in targets if model.get_submodule(target.path) is not target.module}
        for target in targets:
            if target.path in done:
                continue
            choice = plans[target.path]
            if choice.formats:
                choice = choice if calibration is None else _outside_blocks(choice, recipe)
                held[target.path] = held.get(target.tied_to or "") or _pack_target(target, choice, recipe, report)
                replace_module(model, target.path, low_bit_module(target, held[target.path]))
            else:
                report.skipped.append(left_out(target, choice.reason))
            advance(target.path)
    if where is not None and where.source is not None:
        where.source.release()
    order = {target.path: place for place, target in enumerate(targets)}
    report.layers.sort(key=lambda row: order.get(row.path, order.get(row.path.rpartition(".")[0], 0)))
    if not report.layers:
        raise RecipeError(nothing_packed(report))
    warn_about_idle_exceptions([target.path for target in targets], recipe)
    finish(model, report, prepare)
    report.seconds = time.perf_counter() - start
    return report


def _positions(model: Any) -> int | None:
    """How many positions a model says that it has."""
    config = getattr(model, "config", None)
    text = config.get_text_config() if config is not None and hasattr(config, "get_text_config") else config
    found = getattr(text, "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 1 else None


def _check_numbers(model: nn.Module) -> None:
    """Refuse a model whose parameters have no numbers yet."""
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise RecipeError(f"{name} takes its shape from the first input: call the model once, then make it low-bit")
        if parameter.device.type == "meta":
            raise RecipeError(
                f"{name} is on the meta device and has no numbers to pack: load the weights first, or fill the model "
                "from a saved one with load_low_bit"
            )


def finish(model: nn.Module, report: Report, prepare: bool = True) -> None:
    """Choose kernels, note them in the report, count what was not packed, and leave the report on the model."""
    if prepare:
        prepare_(model)
    held = {name.removesuffix(".packed_weight"): weight for name, weight in packed_weights(model).items()}
    kernels = {name: weight.kernel.name for name, weight in held.items() if weight.kernel}
    for row in report.layers:
        row.kernel = kernels.get(row.path, "")
    for name, parameter in model.named_parameters():
        if parameter.device.type != "meta" and parameter.is_floating_point():
            check_finite(parameter.detach(), name)
    skipped = {row.path for row in report.skipped}
    for left in _unknown_weights(model):
        if not any(left.path == path or left.path.startswith(f"{path}.") for path in skipped):
            report.skipped.append(left)
    skipped = {row.path for row in report.skipped}
    rest = [p for name, p in model.named_parameters() if not {name, name.rpartition(".")[0]} & skipped]
    report.other_bytes = sum(p.nbytes for p in rest)
    report.other_weights = sum(p.numel() for p in rest)
    model.lowbit_report = report  # type: ignore[assignment]


def warn_about_idle_exceptions(paths: list[str], recipe: Recipe) -> None:
    """A name to be left out that no weight has, or an override that meets none, is a slip of the pen.

    Overrides that named recipes bring along are made for many families, and not every one has such weights.
    """
    idle = [name for name in recipe.skip if not any(name in path for path in paths)]
    if idle:
        warnings.warn(
            f"no weight of this model has {', '.join(map(repr, idle))} in its path, so nothing is left out for it",
            stacklevel=2,
        )
    given = [pattern for pattern, _ in recipe.overrides if pattern not in OVERRIDES_OF_RECIPES]
    lost = [pattern for pattern in given if not any(re.search(pattern, path) for path in paths)]
    if lost:
        warnings.warn(
            f"no path of this model matches the override {', '.join(map(repr, lost))}, so it changes nothing",
            stacklevel=2,
        )


def _unknown_weights(model: nn.Module) -> list[Skipped]:
    """Matrices in modules that no low-bit module stands in for: fused attention, recurrent layers, a router's own weight."""
    found = []
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(path, recurse=False):
            if parameter.dim() > 1 and min(parameter.shape) > 1:
                kind = type(module).__name__
                found.append(Skipped(name, f"no low-bit module stands in for a {kind}", parameter.nbytes))
    return found


def plan(target: Target, targets: list[Target], recipe: Recipe) -> Choice:
    """What a recipe does to a target. Tied weights are decided once: the head's format holds for both."""
    partners = [t for t in targets if t is not target and (t.tied_to or t.path) == (target.tied_to or target.path)]
    head = next((t for t in (target, *partners) if t.role == "head"), None)
    if any(not weight.numel() for _, weight in dense_weights(target)):
        return Choice(reason="it holds no numbers: one of its sides is zero wide")
    reason = keeps_dense(target.module)
    if reason:
        return Choice(reason=reason)
    if target.role == "linear" and is_router(target.path, target.module):
        return Choice(reason="it routes tokens to experts")
    if head is not None and partners:
        for tied in (target, *partners):
            choice = recipe.choose(tied.path, tied.role)
            if choice.reason.startswith("named in"):
                return Choice(reason=choice.reason if tied is target else f"tied to {tied.path}, {choice.reason}")
        return recipe.choose(head.path, "head")
    return recipe.choose(target.path, target.role)


def pack_weight(
    name: str, weight: torch.Tensor, choice: Choice, recipe: Recipe, report: Report, role: str
) -> PackedTensor:
    """Pack one weight and write its line of the report."""
    check_finite(weight, name)
    formats, note = _without_ranges(*_fit_formats(choice.formats, weight.shape[-1]))
    offers = [_round_alone(weight, format, recipe, choice.importance) for format in formats]
    packed = offers[0] if len(offers) == 1 else min(offers, key=lambda offer: relative_error(weight, offer))
    text = "; ".join(part for part in (note, choice.note) if part)
    report.layers.append(describe_packed(name, role, weight, packed, text))
    return packed


def _round_alone(
    weight: torch.Tensor, format: Format, recipe: Recipe, importance: torch.Tensor | None = None
) -> PackedTensor:
    """A weight without data, or by the importance of its inputs; to nearest where the rounder needs data that is not to be had
    for this weight."""
    if importance is not None:
        return round_weight(weight, format, recipe.rounder, floored(importance.to(weight.device)))
    rounder, options = ROUNDERS[recipe.rounder].round_weight, recipe.rounder_options
    if rounder is None or options is None or options.data == "needed":
        return round_weight(weight, format)
    return rounder(weight, format, None, options).packed


def allocate_bits(model: nn.Module, recipe: Recipe, calibration: Calibration, bits_per_weight: float) -> Recipe:
    """The recipe with 2 to 8 bits for each linear, the experts of a layer and the head, where they save most, at so many
    bits per weight in all.

    Scales are included in the budget; weights that the recipe leaves, or gives a format by an override, are not touched,
    nor are those that no token reaches. The report says which, and which experts were not reached.
    """
    formats = [recipe.linear.with_bits(bits) for bits in OFFERED_BITS] if recipe.linear.kind == "int" else []
    if not formats:
        raise RecipeError(
            f"bits are allocated among integers, and the recipe asks for {recipe.linear}: name an int format"
        )
    targets = find_targets(model)
    free = {t.path for t in targets if plan(t, targets, recipe).formats[:1] in ((recipe.linear,), (recipe.head,))}
    weights = {name: weight for name, weight in linear_weights(model).items() if module_of(name, weight) in free}
    device = next(model.parameters()).device
    windows = calibration.tokens[:MEASURED_WINDOWS].to(device)
    moments = measure_moments(model, counted(list(windows), "measuring what errors cost"))
    with progress("trying 2 to 8 bits", len(weights)) as advance:
        chosen = allocate_formats(weights, moments, formats, bits_per_weight, advance=advance)
    overrides = tuple((f"^{re.escape(path)}$", format) for path, format in chosen.items())
    remarks = {module_of(name, weight): _unmeasured(moments.get(name)) for name, weight in weights.items()}
    notes = tuple((f"^{re.escape(path)}$", remark) for path, remark in remarks.items() if remark)
    name = f"{recipe.name}, {bits_per_weight:g} bits"
    return recipe.replace(overrides=(*overrides, *recipe.overrides), notes=(*notes, *recipe.notes), name=name)


def _unmeasured(moments: Moments | None) -> str:
    """What the report says of a weight of which too little was seen while bits were measured."""
    if moments is None:
        return "no token reached it while bits were measured, so it has the format of the recipe"
    if moments.idle:
        named = ", ".join(map(str, moments.idle)) if len(moments.idle) <= _MOST_NAMED else str(len(moments.idle))
        return f"experts {named} saw no token while bits were measured, and count as the mean of the others"
    return ""


def _for_blocks(targets: list[Target], plans: dict[str, Choice]) -> list[Chosen]:
    """The targets whose inputs are looked at: linears and experts with a weight of their own."""
    shared = {target.tied_to for target in targets if target.tied_to}
    chosen = []
    for target in targets:
        choice = plans[target.path]
        own = not target.tied_to and target.path not in shared
        if choice.formats and own and target.role in ("linear", "experts"):
            formats, note = _fit_formats(choice.formats, min(w.shape[-1] for _, w in dense_weights(target)))
            if target.role == "experts":
                formats, note = _without_ranges(formats, note)
            chosen.append(Chosen(target, formats, "; ".join(text for text in (note, choice.note) if text)))
    return chosen


def _outside_blocks(choice: Choice, recipe: Recipe) -> Choice:
    """A choice with the remark that no activations were looked at."""
    if not recipe.asks_for_data:
        return choice
    remark = "rounded to nearest: its inputs are not those of one linear in a block"
    return replace(choice, note="; ".join(text for text in (choice.note, remark) if text))


def _fit_formats(formats: tuple[Format, ...], in_features: int) -> tuple[tuple[Format, ...], str]:
    """Replace k-quants that would mostly hold padding, and say so."""
    fitted, notes = [], []
    for format in formats:
        block = format.block
        if block is not None and in_features % block.weights:
            fitted.append(format_from_name(block.fallback))
            notes.append(f"{format}: {in_features} inputs are no multiple of {block.weights}, so {block.fallback}")
        else:
            fitted.append(format)
    return tuple(fitted), "; ".join(notes)


def _without_ranges(formats: tuple[Format, ...], note: str) -> tuple[tuple[Format, ...], str]:
    """Formats for weights whose inputs are not those of one linear in a block, so that they have no range of their own."""
    if not any(format.fixed_range for format in formats):
        return formats, note
    remark = "its input has no range of its own, so each row has its own scale"
    return tuple(format.unfixed for format in formats), "; ".join(text for text in (note, remark) if text)


def _pack_target(target: Target, choice: Choice, recipe: Recipe, report: Report) -> list[PackedWeight]:
    weights = []
    for suffix, weight in dense_weights(target):
        name = target.path if suffix == "weight" else f"{target.path}.{suffix}"
        packed = pack_weight(name, weight, choice, recipe, report, target.role)
        weights.append(PackedWeight(packed, weight.dtype))
    return weights


def left_out(target: Target, reason: str) -> Skipped:
    """The report's line for a target that stays as it is."""
    tied = f" (tied to {target.tied_to})" if target.tied_to else ""
    size = 0 if target.tied_to else sum(p.nbytes for p in target.module.parameters(recurse=False))
    return Skipped(target.path, reason + tied, size)


def nothing_packed(report: Report) -> str:
    """The sentence for a model of which nothing was packed."""
    if report.skipped:
        return (
            f"nothing was packed: {len(report.skipped)} weights were left, the first because {report.skipped[0].reason}"
        )
    return "the model has no Linear, Embedding, convolution or experts that could be packed"
