"""Block by block: every linear of a model rounded on what it gets when the blocks before it are rounded already.

    for each block:   calls -> scaler folds -> statistics -> rounder -> W^ in place -> outputs = calls of the next block

The activations of one block are in memory at a time (or, with `spill`, in files), and one Hessian for each tensor that
linears share. While a block is worked on W^ stands in the dense module: what the next block gets is then what the
definition says, on every device, and low-bit modules come in once the block is finished.

Linears are taken in the order in which they run (true-sequential): the output projection sees the rounded query, key
and value. Linears that get the very same tensor share one Hessian and are rounded as one tall weight.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowbit.algorithms import ROUNDERS, SCALERS
from lowbit.algorithms.rtn import relative_error, round_weight
from lowbit.algorithms.statistics import Statistics
from lowbit.algorithms.table import BlockWork, Rounded
from lowbit.blockwise.experts import round_experts_
from lowbit.blockwise.inputs import collect, find_input_groups
from lowbit.blockwise.ranges import fix_ranges_
from lowbit.blockwise.resume import ResumeFolder
from lowbit.calibration import Calibration
from lowbit.errors import RecipeError
from lowbit.formats import Format
from lowbit.grid import check_finite, unpack
from lowbit.layers import PackedWeight
from lowbit.models.capture import Call, Stored, beside_of_blocks, find_blocks, first_calls, run_block
from lowbit.models.walk import Target, dense_weights
from lowbit.packing import PackedTensor
from lowbit.recipe import Recipe
from lowbit.report import LayerReport
from lowbit.swap import low_bit_module, replace_module

LEAST_SHARE = 0.005
# A weight as far from itself as this is gone; two bits leave 0.6 of a normal distribution.
_LOST_ERROR = 0.9
_LOST = (
    "its numbers are lost: too large for fp16 scales (a format with _bf16 scales holds them), or so small that they "
    "became zeros"
)


@dataclass(frozen=True)
class Chosen:
    """A target and the formats that it may take; the note goes to the report."""

    target: Target
    formats: tuple[Format, ...]
    note: str = ""


@dataclass(frozen=True)
class Where:
    """Where a run keeps what it must not lose (`resume`) and what does not fit into memory (`spill`)."""

    resume: str | Path | None = None
    spill: str | Path | None = None


@dataclass
class _State:
    """The block that is being worked on."""

    name: str
    block: nn.Module
    chosen: dict[str, Chosen]
    calls: list[Call]
    full_calls: list[Call]
    original: nn.Module | None = None
    targets: list[torch.Tensor] = field(default_factory=list)
    rows: list[LayerReport] = field(default_factory=list)
    packed: dict[str, list[PackedWeight]] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)


def check_data(recipe: Recipe, calibration: Any) -> None:
    """Refuse a recipe without the data that it needs, and data that would change nothing."""
    if calibration is None and recipe.asks_for_data:
        fixed = recipe.fixed_format
        name = recipe.scaler or (recipe.rounder if fixed is None else f"{fixed}")
        raise RecipeError(
            f"{name} looks at activations and needs calibration tokens: give calibration=, or --calibration FILE"
        )
    if calibration is not None and not recipe.uses_data:
        raise RecipeError(
            f"the rounder {recipe.rounder} looks at no activations: leave the calibration out, or take the rounder rtn or gptq"
        )


def round_in_blocks_(
    model: nn.Module,
    chosen: list[Chosen],
    recipe: Recipe,
    calibration: Calibration,
    where: Where,
    advance: Callable[[str], None],
) -> list[LayerReport]:
    """Round the chosen weights that lie in the blocks of a model, in place; returns their lines of the report."""
    _check_vocabulary(model, calibration)
    if where.spill is not None:
        Path(where.spill).mkdir(parents=True, exist_ok=True)
    training = model.training
    model.eval()
    with torch.no_grad(), tempfile.TemporaryDirectory(dir=where.spill, prefix="lowbit-") as scratch:
        run = _Run(model, chosen, recipe, calibration, Path(scratch) if where.spill else None, advance)
        if where.resume is not None:
            run.resume_(Path(where.resume).expanduser(), calibration)
        rows = run.run_()
    model.train(training)
    return rows


class _Run:
    def __init__(
        self,
        model: nn.Module,
        chosen: list[Chosen],
        recipe: Recipe,
        calibration: Calibration,
        scratch: Path | None,
        advance: Callable[[str], None],
    ) -> None:
        self.model, self.recipe, self.scratch, self.advance = model, recipe, scratch, advance
        self.rounder, self.options = ROUNDERS[recipe.rounder], recipe.rounder_options
        self.blocks = find_blocks(model, calibration.tokens)
        self.chosen = {
            name: {c.target.path.removeprefix(f"{name}."): c for c in chosen if c.target.path.startswith(f"{name}.")}
            for name in self.blocks
        }
        batches = calibration.batches()
        self.tokens = calibration.tokens.numel()
        self.beside = beside_of_blocks(model, self.blocks, batches)
        calls = first_calls(model, batches, self.blocks)
        self.common = [call.beside() for call in calls]
        self.calls = [self._keep(call, call.hidden, f"calls_{i}") for i, call in enumerate(calls)]
        # The stream of the model in full precision, beside that of the rounded one.
        self.full_calls = list(self.calls) if self.rounder.full(self.options) else []
        self.folder: ResumeFolder | None = None
        self.done = 0
        self.rows: list[LayerReport] = []

    def _keep(self, call: Call, hidden: torch.Tensor, name: str) -> Call:
        return call.with_hidden(hidden if self.scratch is None else Stored.save(hidden, self.scratch / f"{name}.npy"))

    def resume_(self, path: Path, calibration: Calibration) -> None:
        """Put finished blocks in place and go on behind them."""
        self.folder = ResumeFolder(path, self.model, self.recipe, calibration)
        self.done = min(self.folder.finished, len(self.blocks))
        for index, name in enumerate(self.blocks[: self.done]):
            targets = [c.target for c in self.chosen[name].values()]
            self.rows += self.folder.restore_block_(index, name, self.model, targets)
            for target in targets:
                self.advance(target.path)
        if self.done:
            hidden = self.folder.hidden(self.done - 1, self.calls[0].hidden.device)
            self.calls = [self._keep(c, hidden[f"calls_{i}"], f"calls_{i}") for i, c in enumerate(self.calls)]
            self.full_calls = [self._keep(c, hidden[f"full_{i}"], f"full_{i}") for i, c in enumerate(self.full_calls)]

    def run_(self) -> list[LayerReport]:
        for index in range(self.done, len(self.blocks)):
            self.rows += self._round_block_(index)
        return self.rows

    def _round_block_(self, index: int) -> list[LayerReport]:
        name, beside = self.blocks[index], self.beside[index]
        self.calls = [c.with_beside(common | beside) for c, common in zip(self.calls, self.common, strict=True)]
        self.full_calls = [c.with_beside(o.beside()) for c, o in zip(self.full_calls, self.calls, strict=False)]
        state = _State(name, self.model.get_submodule(name), self.chosen[name], self.calls, self.full_calls)
        for path, chosen in state.chosen.items():
            for suffix, weight in dense_weights(chosen.target):
                check_finite(weight, f"{name}.{path}.{suffix}")
        if state.full_calls:
            state.targets = [run_block(state.block, call) for call in state.full_calls]
        self._scale_(state)
        if state.full_calls and self.rounder.round_weight is not None:
            state.original = copy.deepcopy(state.block)
        if state.chosen:
            self._round_linears_(state)
            fix_ranges_(state.block, state.name, state.calls, state.packed, state.rows)
        self._move_on(state)
        for path, weights in state.packed.items():
            target = state.chosen[path].target
            replace_module(self.model, target.path, low_bit_module(target, weights))
        if self.folder is not None:
            hidden = {f"calls_{i}": call.hidden for i, call in enumerate(self.calls)}
            hidden |= {f"full_{i}": call.hidden for i, call in enumerate(self.full_calls)}
            self.folder.save_block(index, name, self.model, state.rows, hidden)
        return state.rows

    def _move_on(self, state: _State) -> None:
        """What the next block is called with."""
        if state.full_calls:
            pairs = zip(state.full_calls, state.targets, strict=True)
            self.full_calls = [self._keep(call, target, f"full_{i}") for i, (call, target) in enumerate(pairs)]
        for i, call in enumerate(state.calls):
            self.calls[i] = self._keep(call, run_block(state.block, call), f"calls_{i}")

    def _scale_(self, state: _State) -> None:
        if self.recipe.scaler:
            scaler = SCALERS[self.recipe.scaler]
            state.notes = scaler.scale_block_(self._work(state), self.recipe.scaler_options)

    def _work(self, state: _State) -> BlockWork:
        """The block as algorithms see it. A parameter that is found outside it too is another block's as well."""
        formats = {path: c.formats[0] for path, c in state.chosen.items() if c.target.role != "experts"}
        experts = {
            f"{path}.{suffix}": c.formats[0]
            for path, c in state.chosen.items()
            if c.target.role == "experts"
            for suffix, _ in dense_weights(c.target)
        }
        own = dict(state.block.named_parameters(remove_duplicate=False))
        everything = self.model.named_parameters(remove_duplicate=False)
        outside = {id(p) for name, p in everything if not name.startswith(f"{state.name}.")}
        shared = frozenset(name for name, parameter in own.items() if id(parameter) in outside)
        return BlockWork(state.block, formats, state.calls, state.targets, state.full_calls, experts, shared)

    def _round_linears_(self, state: _State) -> None:
        done: set[str] = set()
        if self.rounder.round_block is not None:
            for path, rounded in self.rounder.round_block(self._work(state), self.options).items():
                ((_, weight),) = dense_weights(state.chosen[path].target)
                self._settle(state, path, weight, rounded)
                done.add(path)
        paths = [path for path in state.chosen if path not in done]
        if not paths:
            return
        groups = find_input_groups(state.block, state.calls[0], paths)
        if getattr(self.options, "true_sequential", False):
            for group in groups:
                self._round_groups_(state, [group])
        else:
            self._round_groups_(state, groups)

    def _round_groups_(self, state: _State, groups: list[list[str]]) -> None:
        """Round the linears of some inputs, whose statistics are collected in one pass."""
        linear = [[path for path in group if state.chosen[path].target.role != "experts"] for group in groups]
        widths = {g[0]: _width(state.chosen[g[0]].target) for g in linear if g}
        full = (state.original, state.full_calls) if state.original is not None else None
        found = collect(state.block, state.calls, widths, self.rounder.hessian, full) if widths else {}
        for group in linear:
            for same in _by_formats(state, group):
                self._round_together_(state, same, found[group[0]])
        for path in [path for group in groups for path in group if state.chosen[path].target.role == "experts"]:
            self._round_experts_(state, path)

    def _round_together_(self, state: _State, paths: list[str], statistics: Statistics) -> None:
        """Linears with one input and one format are one tall weight."""
        weights = [next(dense_weights(state.chosen[path].target))[1] for path in paths]
        rounded = self._round(torch.cat(weights), state.chosen[paths[0]].formats, statistics)
        parts = split_rows(rounded.packed, [len(weight) for weight in weights])
        for path, weight, part in zip(paths, weights, parts, strict=True):
            self._settle(state, path, weight, replace(rounded, packed=part))

    def _round(self, weight: torch.Tensor, formats: tuple[Format, ...], statistics: Statistics) -> Rounded:
        """A weight in the best of some formats, or rounded to nearest where its inputs say too little."""
        reason = self._unfit(statistics)
        assert self.rounder.round_weight is not None
        if reason:
            offers = [Rounded(round_weight(weight, format), reason) for format in formats]
        else:
            offers = [self.rounder.round_weight(weight, format, statistics, self.options) for format in formats]
        if len(offers) == 1:
            return offers[0]
        if self.rounder.hessian and not reason:
            return min(offers, key=lambda o: statistics.output_error(weight, unpack(o.packed)))
        return min(offers, key=lambda o: relative_error(weight, o.packed))

    def _unfit(self, statistics: Statistics) -> str:
        """Why statistics say too little to round by, or nothing."""
        if self.options is None or self.options.data == "none":
            return ""
        if statistics.tokens < max(getattr(self.options, "least_share", LEAST_SHARE) * self.tokens, 1):
            return f"rounded to nearest: it saw {statistics.tokens} of {self.tokens} calibration tokens"
        return "rounded to nearest: it saw nothing but zeros" if statistics.is_blank else ""

    def _round_experts_(self, state: _State, path: str) -> None:
        chosen = state.chosen[path]
        format = chosen.formats[0]
        if not _rows_are_apart(format) or format.kind == "kquant":
            for suffix, weight in dense_weights(chosen.target):
                note = f"rounded to nearest: the scales of {format} depend on all experts"
                self._settle(state, path, weight, Rounded(round_weight(weight, format), note), suffix)
            return
        for suffix, weight, rounded in round_experts_(
            state.block,
            chosen.target,
            path,
            state.calls,
            self.rounder.hessian,
            lambda w, s: self._round(w, chosen.formats[:1], s),
        ):
            self._settle(state, path, weight, rounded, suffix)

    def _settle(self, state: _State, path: str, weight: torch.Tensor, rounded: Rounded, suffix: str = "") -> None:
        """Write the line of the report, put W^ in the dense module, and keep the packed weight for later."""
        chosen = state.chosen[path]
        scaled = state.notes.get(f"{path}.{suffix}" if suffix else path, "")
        note = "; ".join(text for text in (chosen.note, scaled, rounded.note) if text)
        name = f"{chosen.target.path}.{suffix}" if suffix else chosen.target.path
        state.rows.append(describe_packed(name, chosen.target.role, weight, rounded.packed, note))
        state.packed.setdefault(path, []).append(PackedWeight(rounded.packed, weight.dtype))
        weight.copy_(unpack(rounded.packed, weight.dtype))
        if chosen.target.role != "experts" or suffix == "down_proj":
            self.advance(chosen.target.path)


def describe_packed(name: str, role: str, weight: torch.Tensor, packed: PackedTensor, note: str) -> LayerReport:
    """The line of the report of a packed weight."""
    error = relative_error(weight, packed)
    note = "; ".join(text for text in (note, _LOST if error > _LOST_ERROR else "") if text)
    return LayerReport(
        name, role, packed.format.name, list(weight.shape), weight.nbytes, packed.nbytes, error, note=note
    )


def split_rows(packed: PackedTensor, counts: list[int]) -> list[PackedTensor]:
    """A weight [out, in] cut into several along its outputs."""
    if len(counts) == 1:
        return [packed]
    cut = {name: tensor.split(counts) for name, tensor in packed.tensors().items()}
    return [
        PackedTensor(packed.format, (count, packed.shape[1]), **{name: parts[i].clone() for name, parts in cut.items()})
        for i, count in enumerate(counts)
    ]


def _by_formats(state: _State, group: list[str]) -> list[list[str]]:
    """The linears of one input, those of one format together if its rows have nothing to do with one another."""
    found: dict[object, list[str]] = {}
    for path in group:
        formats = state.chosen[path].formats
        together = len(formats) == 1 and _rows_are_apart(formats[0])
        found.setdefault((formats, "" if together else path), []).append(path)
    return list(found.values())


def _rows_are_apart(format: Format) -> bool:
    return not (format.scale_block or format.has_global_scale or format.group_size == 0)


def _width(target: Target) -> int:
    return int(next(dense_weights(target))[1].shape[-1])


def _check_vocabulary(model: nn.Module, calibration: Calibration) -> None:
    method = getattr(model, "get_input_embeddings", None)
    embedding = method() if callable(method) else None
    known, largest = getattr(embedding, "num_embeddings", None), int(calibration.tokens.max())
    if known is not None and largest >= known:
        raise RecipeError(
            f"the calibration tokens go up to {largest} and the model knows {known}: they are of another tokenizer"
        )
