"""TEQ: scales that are trained (arXiv 2310.10944), all groups of a block together.

    minimise over s    |f(x, round(W s) / s) - f(x, W)|^2        f: the block; one s > 0 for each input, s = exp(t), t = 0 at first

A group's columns are multiplied by s, what is before them would be divided by it, and only rounding sees the
difference. Rounding has no gradient of its own: its error e = round(W s) - W s is taken as it fell, and as
proportional to the range a(W s) of each group of weights, which is what the step of any format follows,

    W^ = W + e / s * a(W s) / a'           a' = a(W s) without gradient

so that a larger s protects its own input and widens the step for its neighbours. Adam, at a rate that falls to nothing;
every so many steps the loss is taken over the same tokens, and the best scales are kept: no scale at all is where it
begins, so that training cannot leave a block worse than it found it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.func import functional_call

from lowbit.algorithms.rtn import importance_of, round_by_search
from lowbit.algorithms.scaling import Round, collect_inputs, group_max, some_of
from lowbit.algorithms.table import BlockWork
from lowbit.algorithms.trials import groups_of
from lowbit.bits import spread_groups
from lowbit.models.capture import run_block
from lowbit.models.folding import Holder, ScalingGroup, find_holder, fold_scale_
from lowbit.models.groups import first_tensor
from lowbit.options import TeqOptions


@dataclass(frozen=True)
class Trained:
    """The best scales, one [in] for each group, and the loss before training and with them."""

    scales: list[torch.Tensor]
    before: float
    after: float


def scale_by_teq_(work: BlockWork, options: TeqOptions) -> dict[str, str]:
    """Train, and fold what was learnt. Gives a note for each linear."""
    groups, notes = groups_of(work, "teq")
    formats = work.formats | work.experts
    groups = [group for group in groups if set(group.linears) & set(formats)]
    if groups:
        trained = train_scales(work, groups, options)
        for group, scale in zip(groups, trained.scales, strict=True):
            fold_scale_(work.block, group, scale)
            notes |= dict.fromkeys(group.linears, f"teq: block error {trained.before:.3g} to {trained.after:.3g}")
    return {name: note for name, note in notes.items() if name in formats}


def train_scales(
    work: BlockWork, groups: list[ScalingGroup], options: TeqOptions, round: Round = round_by_search
) -> Trained:
    """The scales of groups [in] with the least squared error of the block's output."""
    training = _Training(work, groups, options.tokens, round)
    logs = training.begin()
    optimizer = torch.optim.Adam(logs, lr=options.rate)
    falling = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=options.steps)
    generator = torch.Generator().manual_seed(options.seed)
    best, before = [log.detach().clone() for log in logs], training.loss(logs)
    after, every = before, max(options.steps // options.checks, 1)
    for step in range(1, options.steps + 1):
        index = int(torch.randint(len(training.calls), (), generator=generator))
        optimizer.zero_grad()
        with torch.enable_grad():
            torch.autograd.backward(training.error(training.weights(logs), index))
        optimizer.step()
        falling.step()
        work.tell(f"teq {step} of {options.steps}", 0.0)
        if step % every == 0 or step == options.steps:
            loss = training.loss(logs)
            if loss < after:
                best, after = [log.detach().clone() for log in logs], loss
    return Trained([group.tie(log.exp()) for group, log in zip(groups, best, strict=True)], before, after)


class _Training:
    """A block, its calls and what it gives for them; its output under scales, with a gradient."""

    def __init__(self, work: BlockWork, groups: list[ScalingGroup], tokens: int, round: Round) -> None:
        self.block, self.groups, self.round = work.block, groups, round
        self.formats = work.formats | work.experts
        self.calls = some_of(work.calls, tokens)
        self.targets = [run_block(work.block, call) for call in self.calls]
        self.size = sum(float(target.float().square().sum()) for target in self.targets)
        self.linears = [[find_holder(work.block, n) for n in g.linears if n in self.formats] for g in groups]
        self.squares = [self._square(work, g, h[0]) for g, h in zip(groups, self.linears, strict=True)]

    @staticmethod
    def _square(work: BlockWork, group: ScalingGroup, holder: Holder) -> torch.Tensor | None:
        """The importance of a group's inputs [in]; None where each expert has inputs of its own."""
        found = None if group.experts else collect_inputs(work.block, work.calls, holder.target.module)
        return None if found is None else importance_of(found)

    def begin(self) -> list[torch.Tensor]:
        """t = log s = 0 for every group: [in], or [experts, in]."""
        weights = [holders[0].read() for holders in self.linears]
        sizes = [(*(w.shape[:1] if g.experts else ()), w.shape[-1]) for g, w in zip(self.groups, weights, strict=True)]
        return [torch.zeros(size, device=w.device, requires_grad=True) for size, w in zip(sizes, weights, strict=True)]

    def weights(self, logs: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        """The parameters of the block as they come back under scales."""
        changed = {}
        for group, holders, square, log in zip(self.groups, self.linears, self.squares, logs, strict=True):
            scale = group.tie(log.exp())
            for holder in holders:
                changed[holder.parameter] = holder.turn(self._rounded(holder, scale, square).to(holder.read().dtype))
        return changed

    def error(self, weights: dict[str, torch.Tensor], index: int) -> torch.Tensor:
        """The squared error of the block's output for one call, relative to the mean of all."""
        call = self.calls[index].with_hidden(self.calls[index].hidden)
        output = first_tensor(functional_call(self.block, weights, call.args, call.kwargs))
        return (output.float() - self.targets[index].float()).square().sum() * (len(self.calls) / max(self.size, 1e-30))

    def loss(self, logs: list[torch.Tensor]) -> float:
        with torch.no_grad():
            weights = self.weights(logs)
            return sum(float(self.error(weights, index)) for index in range(len(self.calls))) / len(self.calls)

    def _rounded(self, holder: Holder, scale: torch.Tensor, square: torch.Tensor | None) -> torch.Tensor:
        """W + e / s * a / a'."""
        format, weight = self.formats[holder.name], holder.read().detach().float()
        columns = scale.unsqueeze(-2) if scale.dim() > 1 else scale
        scaled = weight * columns
        fixed = scaled.detach()
        importance = None if square is None else square / scale.detach().square()
        error = self.round(fixed, format, importance) - fixed
        reach = group_max(scaled.abs(), format)
        growth = spread_groups(reach / reach.detach(), format, weight.shape[-1])
        return weight + error * growth / columns
