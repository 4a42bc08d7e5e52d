"""One block while its weights are rounded: scaled, looked at, rounded group by group, W^ put into the dense modules.

Linears are taken in the order in which they run (true-sequential): the output projection sees the rounded query, key
and value. Linears that get the very same tensor share one Hessian and are rounded as one tall weight.

Scalers search with each weight rounded to nearest, which is quick and not what GPTQ or AutoRound do. There the block is
rounded twice, as it is and scaled, and what leaves less error in its output

    |block(x; W^) - block(x_full; W)|^2 / |block(x_full; W)|^2

is kept; the report has both figures. Where nobody asks for the stream in full precision x stands for x_full.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import count

import torch
from torch import nn

from lowbit.algorithms import ROUNDERS, SCALERS
from lowbit.algorithms.rtn import relative_error, round_weight
from lowbit.algorithms.statistics import Statistics
from lowbit.algorithms.table import BlockWork, Rounded
from lowbit.blockwise.experts import round_experts_
from lowbit.blockwise.inputs import InputGroups, Keep, Kept, collect, collect_full, find_input_groups
from lowbit.blockwise.ranges import fix_ranges_
from lowbit.blockwise.weights import (
    Chosen,
    by_formats,
    describe_packed,
    linears_of,
    rows_are_apart,
    split_rows,
    width_of,
)
from lowbit.formats import Format
from lowbit.grid import check_finite, unpack
from lowbit.layers import PackedWeight
from lowbit.models.capture import Call, Stored, loaded, run_block
from lowbit.models.walk import dense_weights
from lowbit.progress import Advance
from lowbit.recipe import Recipe
from lowbit.report import LayerReport

LEAST_SHARE = 0.005


@dataclass(frozen=True)
class Job:
    """What holds for all blocks. `tokens`: how many there are to calibrate on; `keep` puts away an activation."""

    model: nn.Module
    recipe: Recipe
    tokens: int
    keep: Keep
    advance: Advance


@dataclass(frozen=True)
class _Attempt:
    """A block as it was rounded once, and the error of what it gives."""

    weights: dict[str, torch.Tensor]
    rows: list[LayerReport]
    packed: dict[str, list[PackedWeight]]
    outputs: list[torch.Tensor | Stored]
    error: float


class BlockRounding:
    """One block: `rows` for the report, the `packed` weights by their paths in the block, and what it gives afterwards."""

    def __init__(
        self, job: Job, name: str, chosen: dict[str, Chosen], calls: list[Call], full_calls: list[Call], last: bool
    ) -> None:
        self.job, self.name, self.chosen, self.last = job, name, chosen, last
        self.calls, self.full_calls = calls, full_calls
        self.block = job.model.get_submodule(name)
        self.rounder, self.options = ROUNDERS[job.recipe.rounder], job.recipe.rounder_options
        # What the block gives in full precision, and after rounding, call by call; empty until somebody has run it.
        self.targets: list[torch.Tensor | Stored] = []
        self.outputs: list[torch.Tensor | Stored] = []
        self.full_inputs: list[Kept] | None = None
        self.groups = InputGroups([], {})
        self.rows: list[LayerReport] = []
        self.packed: dict[str, list[PackedWeight]] = {}
        self.notes: dict[str, str] = {}
        # A block that is rounded twice is half done after the first time, whose weights are no steps of the work.
        self.counts, self.twice, self.share = True, False, 0.0
        self.tried = self.settled = 0

    def round_(self) -> None:
        for path, chosen in self.chosen.items():
            for suffix, weight in dense_weights(chosen.target):
                check_finite(weight, f"{self.name}.{path}.{suffix}")
        by_block = self.rounder.round_block is not None
        if self.full_calls and (self.job.recipe.scaler or by_block):
            self.targets = self._run_all(self.full_calls)
        if self.job.recipe.scaler and self.chosen and (self.rounder.hessian or by_block):
            self._round_with_and_without_scale_()
        else:
            self._scale_()
            if self.chosen:
                self._round_linears_()
        fix_ranges_(self.block, self.name, self.calls, self.packed, self.rows)

    def _round_with_and_without_scale_(self) -> None:
        """Round the block as it is, and scaled; keep what is nearer to the block in full precision."""
        wanted = self.targets or self._run_all(self.calls)
        before = {name: parameter.clone() for name, parameter in self.block.named_parameters()}
        self.counts, self.twice = False, True
        self._round_linears_()
        plain = self._attempt(wanted, "plain")
        self._put_back_(before)
        self.rows, self.packed, self.full_inputs, self.counts = [], {}, None, True
        self._scale_()
        self._round_linears_()
        scaled = self._attempt(wanted, "scaled")
        better = scaled.error < plain.error
        kept = scaled if better else plain
        if not better:
            self._put_back_(plain.weights)
        self.rows, self.packed, self.outputs = kept.rows, kept.packed, kept.outputs
        names = self.job.recipe.scaler, self.job.recipe.rounder
        said = f"{names[0]}: error of the block with {names[1]} {scaled.error:.3g}, without a scale {plain.error:.3g}"
        for row in self.rows:
            row.note = "; ".join(text for text in (row.note, said if better else f"{said}, so none is kept") if text)

    def _run_all(self, calls: list[Call]) -> list[torch.Tensor | Stored]:
        """What the block gives as it is."""
        return [self.job.keep(run_block(self.block, call), f"targets_{i}") for i, call in enumerate(calls)]

    def _attempt(self, wanted: list[torch.Tensor | Stored], name: str) -> _Attempt:
        outputs, error, size = [], 0.0, 0.0
        for i, (call, target) in enumerate(zip(self.calls, map(loaded, wanted), strict=True)):
            output = run_block(self.block, call)
            error += float((output.float() - target.float()).square().sum())
            size += float(target.float().square().sum())
            outputs.append(self.job.keep(output, f"{name}_{i}"))
        weights = {name: parameter.clone() for name, parameter in self.block.named_parameters()}
        return _Attempt(weights, self.rows, self.packed, outputs, error / size if size else 0.0)

    def _put_back_(self, weights: dict[str, torch.Tensor]) -> None:
        for name, parameter in self.block.named_parameters():
            parameter.copy_(weights[name])

    def _scale_(self) -> None:
        if self.job.recipe.scaler:
            scaler = SCALERS[self.job.recipe.scaler]
            self.notes = scaler.scale_block_(self._work(), self.job.recipe.scaler_options)

    def _work(self) -> BlockWork:
        """The block as algorithms see it. A parameter that is found outside it too is another block's as well."""
        formats = {path: c.formats[0] for path, c in self.chosen.items() if c.target.role != "experts"}
        experts = {
            f"{path}.{suffix}": c.formats[0]
            for path, c in self.chosen.items()
            if c.target.role == "experts"
            for suffix, _ in dense_weights(c.target)
        }
        own = dict(self.block.named_parameters(remove_duplicate=False))
        everything = self.job.model.named_parameters(remove_duplicate=False)
        outside = {id(p) for name, p in everything if not name.startswith(f"{self.name}.")}
        shared = frozenset(name for name, parameter in own.items() if id(parameter) in outside)
        targets = list(map(loaded, self.targets))
        return BlockWork(self.block, formats, self.calls, targets, self.full_calls, experts, shared, self._tell)

    def _round_linears_(self) -> None:
        done: set[str] = set()
        if self.rounder.round_block is not None:
            for path, rounded in self.rounder.round_block(self._work(), self.options).items():
                ((_, weight),) = dense_weights(self.chosen[path].target)
                self._settle(path, weight, rounded)
                done.add(path)
        paths = [path for path in self.chosen if path not in done]
        if not paths:
            return
        self.groups = find_input_groups(self.block, self.calls[0], paths)
        if self.full_calls and self.rounder.hessian:
            self._look_at_full()
        if getattr(self.options, "true_sequential", False):
            for group in self.groups.paths:
                self._round_groups_([group])
        else:
            self._round_groups_(self.groups.paths)

    def _look_at_full(self) -> None:
        """What the linears get in full precision: one pass for all of them, while the block still is in it.

        What the block gives comes along, where it is not known yet and somebody asks for it.
        """
        linear = [path for group in self.groups.paths for path in linears_of(self.chosen, group)[:1]]
        visits = {path: self.groups.visits[path] for path in linear}
        whole = not self.targets and not self.last
        if not visits and not whole:
            return
        found = collect_full(self.block, self.full_calls, visits, whole, self.job.keep)
        self.full_inputs = found.inputs
        self.targets = found.outputs or self.targets

    def _round_groups_(self, groups: list[list[str]]) -> None:
        """Round the linears of some inputs, whose statistics are collected in one pass."""
        linear = [linears_of(self.chosen, group) for group in groups]
        widths = {g[0]: width_of(self.chosen[g[0]].target) for g in linear if g}
        found: dict[str, Statistics] = {}
        if widths:
            visits, hessian = self.groups.visits, self.rounder.hessian
            found = collect(self.block, self.calls, widths, visits, hessian, self.full_inputs)
        for group in linear:
            for same in by_formats(self.chosen, group):
                self._round_together_(same, found[group[0]])
        for path in [path for group in groups for path in group if self.chosen[path].target.role == "experts"]:
            self._round_experts_(path)

    def _round_together_(self, paths: list[str], statistics: Statistics) -> None:
        """Linears with one input and one format are one tall weight."""
        weights = [next(dense_weights(self.chosen[path].target))[1] for path in paths]
        rounded = self._round(torch.cat(weights), self.chosen[paths[0]].formats, statistics)
        parts = split_rows(rounded.packed, [len(weight) for weight in weights])
        for path, weight, part in zip(paths, weights, parts, strict=True):
            self._settle(path, weight, replace(rounded, packed=part))

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
        if statistics.tokens < max(getattr(self.options, "least_share", LEAST_SHARE) * self.job.tokens, 1):
            return f"rounded to nearest: it saw {statistics.tokens} of {self.job.tokens} calibration tokens"
        return "rounded to nearest: it saw nothing but zeros" if statistics.is_blank else ""

    def _round_experts_(self, path: str) -> None:
        chosen = self.chosen[path]
        format = chosen.formats[0]
        if not rows_are_apart(format) or format.kind == "kquant":
            for suffix, weight in dense_weights(chosen.target):
                note = f"rounded to nearest: the scales of {format} depend on all experts"
                self._settle(path, weight, Rounded(round_weight(weight, format), note), suffix)
            return
        total = sum(len(weight) for _, weight in dense_weights(chosen.target))
        place = count(1)

        def round_one(weight: torch.Tensor, statistics: Statistics) -> Rounded:
            self._tell(f"{path}, {next(place)} of {total}", 0.0)
            return self._round(weight, chosen.formats[:1], statistics)

        visits = self.groups.visits[path]
        for suffix, weight, rounded in round_experts_(
            self.block, chosen.target, path, self.calls, visits, self.rounder.hessian, round_one
        ):
            self._settle(path, weight, rounded, suffix)

    def _settle(self, path: str, weight: torch.Tensor, rounded: Rounded, suffix: str = "") -> None:
        """Write the line of the report, put W^ in the dense module, and keep the packed weight for later."""
        chosen = self.chosen[path]
        scaled = self.notes.get(f"{path}.{suffix}" if suffix else path, "")
        note = "; ".join(text for text in (chosen.note, scaled, rounded.note) if text)
        name = f"{chosen.target.path}.{suffix}" if suffix else chosen.target.path
        self.rows.append(describe_packed(name, chosen.target.role, weight, rounded.packed, note))
        self.packed.setdefault(path, []).append(PackedWeight(rounded.packed, weight.dtype))
        weight.copy_(unpack(rounded.packed, weight.dtype))
        if chosen.target.role != "experts" or suffix == "down_proj":
            self._advance(chosen.target.path)

    def _advance(self, path: str) -> None:
        if self.counts:
            self.settled += 1
            self.job.advance(path)
        else:
            self.tried += 1
            self._tell(f"{path.removeprefix(f'{self.name}.')} without a scale", self.tried / len(self.chosen))

    def _tell(self, what: str, share: float) -> None:
        """What is being done to the block, and how much of this rounding is done."""
        if self.twice:
            share = (share + self.counts) / 2
        self.share = max(self.share, share)
        self.job.advance(f"{self.name}: {what}", part=max(len(self.chosen) * self.share - self.settled, 0.0))
