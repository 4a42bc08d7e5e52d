"""AWQ: protect the channels that activations make large (arXiv 2306.00978).

    s = (mean |x|)^r                                  r = 0, 1/20, .. 19/20, one for each group of linears with one input
    s = (mean |x|)^r / (mean |w| / amax)^(1 - r)      with `duo`, which also sees how much room the weights leave
    s /= sqrt(max s * min s)

The ratio with the least error of the parent module's output wins, rounded as the recipe really rounds, and no scale at
all is always among the candidates. Every fourth ratio is tried first and then, around the best, the steps between: 9 of
20 trials, each of which runs the parent. Then the weights of each group of inputs are clipped at the fraction of their
largest that leaves the least error of the linear's output, dw X^T X dw^T over the tokens, one fraction for each row and
group; queries and keys are left out, because what their errors do is decided by a softmax. A clip is kept only where
the error of the whole linear falls.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import torch

from lowbit.algorithms.rtn import round_by_search
from lowbit.algorithms.scaling import Round, group_max, grouped, inputs_of
from lowbit.algorithms.table import BlockWork
from lowbit.algorithms.trials import Trial, scale_groups_
from lowbit.bits import spread_groups
from lowbit.formats import Format
from lowbit.models.folding import find_holder
from lowbit.options import AwqOptions

# What the families call the linears whose output meets a softmax, alone or fused with values.
QUERIES_AND_KEYS = re.compile(
    r"(^|[._])(q|k|query|key)(_proj|_lin)?$|(^|\.)(query_key_value|qkv_proj|qkv|[wW]qkv|W_pack|c_attn|att_proj)$"
)
# Every so many-th step of the ratios, and how far from the best of them one looks then.
_STRIDES = (4, 2, 1)
_CLIP_STEPS = 10
_CLIP_STEP = 0.05
_LEAST_SCALE = 1e-4


def scale_by_awq_(work: BlockWork, options: AwqOptions) -> dict[str, str]:
    """Search and fold a scale for each group of the block, then clip. Gives a note for each linear."""

    def search(trial: Trial) -> tuple[torch.Tensor | None, str]:
        return search_scale(trial, options)

    notes = scale_groups_(work, "awq", options.tokens, search) if options.scale else {}
    if options.clip:
        clipped = clip_block_(work, options)
        notes |= {
            name: "; ".join(text for text in (notes.get(name, ""), note) if text) for name, note in clipped.items()
        }
    return notes


def search_scale(trial: Trial, options: AwqOptions) -> tuple[torch.Tensor | None, str]:
    """The scale [in] with the least error of the parent's output, None where no scale is the best, and its name."""
    plain, room = trial.loss(None), _mean_fill(trial)
    best, least, name = None, plain, "no scale is better than none"
    for duo in ("on", "off") if options.duo == "both" else (options.duo,):
        losses: dict[int, float] = {} if duo == "on" else {0: plain}  # what a ratio of 0 amounts to there
        for step in _ladder(options.steps, losses):
            scale = _scale_at(trial, step / options.steps, room if duo == "on" else None)
            losses[step] = torch.inf if scale is None else trial.loss(scale)
            if losses[step] < least:
                best, least = scale, losses[step]
                name = f"ratio {step / options.steps:g}{' with duo' if duo == 'on' else ''}"
    return best, name


def _ladder(steps: int, losses: Mapping[int, float]) -> Iterator[int]:
    """The steps to try, of which the caller notes the losses: some of all, then those around the best of them."""
    for stride in _STRIDES:
        near = range(0, steps, stride)
        if stride < _STRIDES[0]:
            least = min(losses, key=losses.__getitem__)
            near = range(least - stride, least + stride + 1, 2 * stride)
        yield from [step for step in near if 0 <= step < steps and step not in losses]


def _scale_at(trial: Trial, ratio: float, room: torch.Tensor | None) -> torch.Tensor | None:
    """The scale of a ratio, with duo by the room that weights leave; None where it is not finite."""
    scale = trial.statistics.mean_size.clamp_min(_LEAST_SCALE).pow(ratio)
    if room is not None:
        scale = scale / (room.pow(1 - ratio) + _LEAST_SCALE)
    scale = scale.clamp_min(_LEAST_SCALE)
    scale = trial.group.tie(scale / (scale.max() * scale.min()).sqrt())
    return scale if bool(torch.isfinite(scale).all()) else None


def _mean_fill(trial: Trial) -> torch.Tensor:
    """How far each input's weights reach into the range of their groups, on average over all rows: [in]."""
    total, rows = torch.zeros_like(trial.statistics.mean_size), 0
    for name, weight in trial.weights.items():
        flat = weight.flatten(0, -2).abs()
        total += (flat / spread_groups(group_max(flat, trial.formats[name]), trial.formats[name], flat.shape[-1])).sum(
            0
        )
        rows += len(flat)
    return total / max(rows, 1)


def clip_block_(work: BlockWork, options: AwqOptions) -> dict[str, str]:
    """Clip the weights of a block in place where that leaves less error. Gives a note for each linear that was clipped."""
    notes = {}
    for name in [name for name in work.formats if not QUERIES_AND_KEYS.search(name)]:
        holder = find_holder(work.block, name)
        x = inputs_of(work.block, work.calls, holder.target.module, options.tokens)
        weight = holder.read()
        limit = None if x is None else search_clip(weight.float(), x, work.formats[name])
        if limit is not None:
            with torch.no_grad():
                weight.copy_(clip_weight(weight.float(), limit, work.formats[name]))
            notes[name] = "clipped"
    return notes


def clip_weight(weight: torch.Tensor, limit: torch.Tensor, format: Format) -> torch.Tensor:
    """A weight [out, in] with the groups of its rows clipped at +-limit [out, G]."""
    spread = spread_groups(limit, format, weight.shape[-1])
    return weight.clamp(-spread, spread)


@torch.no_grad()
def search_clip(
    weight: torch.Tensor, x: torch.Tensor, format: Format, round: Round = round_by_search
) -> torch.Tensor | None:
    """The limits [out, G] for a weight [out, in] on inputs x [tokens, in], or None where clipping does not lessen the error."""
    if format.group_size == 0 or not len(x):
        return None
    x = x.float()
    importance = x.square().mean(0).clamp_min(float(x.square().mean()) * 1e-3)
    columns = grouped(x, format)  # [tokens, G, group]
    products = torch.einsum("tgi,tgj->gij", columns, columns)
    largest = group_max(weight.abs(), format)
    limit, least = largest, torch.full_like(largest, torch.inf)
    for step in range(_CLIP_STEPS):
        tried = largest * (1 - step * _CLIP_STEP)
        change = grouped(round(clip_weight(weight, tried, format), format, importance) - weight, format)
        error = torch.einsum("ogi,gij,ogj->og", change, products, change)
        limit, least = torch.where(error < least, tried, limit), torch.minimum(error, least)
    before = x @ (round(weight, format, importance) - weight).t()
    after = x @ (round(clip_weight(weight, limit, format), format, importance) - weight).t()
    return limit if float(after.square().sum()) < float(before.square().sum()) else None
