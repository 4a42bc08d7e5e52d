"""What the scalers share: rounding as it is asked for, the inputs of linears, and the groups of weights that share a step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn

from lowbit.algorithms.statistics import Statistics
from lowbit.formats import Format
from lowbit.models.capture import Call, watch_calls
from lowbit.models.groups import first_tensor

# Weight [.., out, in], format, importance [in] or None -> the weight that comes back.
Round = Callable[[torch.Tensor, Format, torch.Tensor | None], torch.Tensor]


def some_of(calls: Sequence[Call], tokens: int) -> Sequence[Call]:
    """Every so many-th call, so that there are about `tokens` tokens and at least one call."""
    length = max(calls[0].hidden.shape[:-1].numel(), 1)
    return calls[:: max(len(calls) * length // max(tokens, length), 1)]


def collect_inputs(block: nn.Module, calls: Sequence[Call], reader: nn.Module) -> Statistics | None:
    """Statistics of what a module of a block is given over all calls; None where it is not called."""
    found: Statistics | None = None
    for x in _inputs(block, calls, reader):
        if found is None:
            found = Statistics(x.shape[-1], x.device, hessian=False)
        found.add_(x)
    return found


def inputs_of(block: nn.Module, calls: Sequence[Call], reader: nn.Module, tokens: int) -> torch.Tensor | None:
    """Up to about `tokens` rows [tokens, in] of what a module of a block is given; None where it is not called."""
    rows = [x.flatten(0, -2) for x in _inputs(block, some_of(calls, tokens), reader)]
    if not rows:
        return None
    joined = torch.cat(rows)
    return joined[:: max(len(joined) // tokens, 1)]


def _inputs(block: nn.Module, calls: Sequence[Call], reader: nn.Module) -> Iterator[torch.Tensor]:
    for seen in watch_calls(block, calls, [reader]):
        yield from map(first_tensor, seen.given.get(reader, ()))


def group_max(size: torch.Tensor, format: Format) -> torch.Tensor:
    """The largest of each group of |w| [.., out, in]: [.., out, G]; never nothing."""
    largest = grouped(size, format).amax(-1) if format.group_size else size.amax((-2, -1), keepdim=True)
    return largest.clamp_min(float(torch.finfo(torch.float32).tiny))


def grouped(values: torch.Tensor, format: Format) -> torch.Tensor:
    """[.., in] as [.., G, group], the last group filled with zeros."""
    width = values.shape[-1]
    group = format.group_size if 0 < format.group_size < width else width
    padded = nn.functional.pad(values, (0, -width % group))
    return padded.view(*padded.shape[:-1], -1, group)
