"""Which row of a weight is behind each channel of a tensor, found by asking the numbers.

Scale some rows of a weight by two and run again. A channel that such a row feeds linearly comes out doubled, to the bit,
since a power of two is exact in every floating point type; one that it does not feed comes out as it was; anything else
(a softmax, a gelu, a norm in between) leaves neither. With row r doubled in those runs whose bit is set in r + 1,

    source of channel i = (the bits of the runs in which channel i doubled) - 1          log2(rows) runs

so that heads that are repeated for grouped queries, the values in a fused projection and the second half of a fused MLP
are found without a name or a config. In a fused weight not every row is linear, and the rows that are lie at its end,
at its start, or at the end of each head's part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

# Runs a block with the rows of a mask doubled and gives the tensor in question as [tokens, channels].
Doubled = Callable[[torch.Tensor], torch.Tensor]
_ROUNDING = 1e-5
_SAME, _TWICE, _DEAD, _OTHER = range(4)


def find_sources(base: torch.Tensor, doubled: Doubled, rows: int) -> torch.Tensor | None:
    """The source row of each channel of `base` [tokens, in], or None where a channel is no multiple of a single row."""
    everything = torch.ones(rows, dtype=torch.bool)
    states = _states(base, doubled(everything))
    if not bool((states == _OTHER).any()):
        return _read(base, doubled, everything) if bool((states == _TWICE).any()) else None
    if rows <= base.shape[-1]:
        return None
    tries = (_read(base, doubled, mask) for mask in _fused(base, doubled, rows))
    return next((found for found in tries if found is not None), None)


def _states(base: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """What became of each channel."""
    largest = base.abs().amax(0)
    states = torch.full_like(largest, _OTHER, dtype=torch.int64)
    states[(after - base).abs().amax(0) <= _ROUNDING * largest] = _SAME
    states[(after - 2 * base).abs().amax(0) <= _ROUNDING * largest] = _TWICE
    states[(largest == 0) & (after.abs().amax(0) == 0)] = _DEAD
    return states


def _is_linear(base: torch.Tensor, after: torch.Tensor) -> bool:
    return not bool((_states(base, after) == _OTHER).any())


def _read(base: torch.Tensor, doubled: Doubled, linear: torch.Tensor) -> torch.Tensor | None:
    """The sources among rows that are linear."""
    numbers = torch.where(linear, linear.cumsum(0), 0)
    source = torch.zeros(base.shape[-1], dtype=torch.int64)
    dead = torch.zeros_like(source, dtype=torch.bool)
    for bit in range(int(numbers.max()).bit_length()):
        states = _states(base, doubled((numbers >> bit) % 2 == 1))
        if bool((states == _OTHER).any()):
            return None
        source += (states == _TWICE).long().cpu() << bit
        dead |= (states == _DEAD).cpu()
    if bool(dead.all()) or bool((source[~dead] == 0).any()):
        return None
    place = linear.nonzero().flatten()
    found = place[(source - 1).clamp_min(0)]
    return _fill_dead(found, dead, linear)


def _fill_dead(found: torch.Tensor, dead: torch.Tensor, linear: torch.Tensor) -> torch.Tensor | None:
    """Channels that are zero for every token tell nothing; where the others lie one after another, they lie between."""
    if not bool(dead.any()):
        return found
    channels = torch.arange(len(found))
    shift = (found - channels)[~dead]
    if not bool((shift == shift[0]).all()):
        return None
    filled = channels + shift[0]
    return filled if int(filled[0]) >= 0 and int(filled[-1]) < len(linear) else None


def _fused(base: torch.Tensor, doubled: Doubled, rows: int) -> Iterator[torch.Tensor]:
    """Where the linear rows of a fused weight may lie, likeliest first."""
    place, width = torch.arange(rows), base.shape[-1]

    def longest(part: Callable[[int], torch.Tensor]) -> torch.Tensor:
        low, high = 0, rows  # part(low) is linear, part(high) is not
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if _is_linear(base, doubled(part(middle))) else (low, middle)
        return part(low)

    for part in (lambda count: place >= rows - count, lambda count: place < count):
        mask = longest(part)
        if bool(mask.any()):
            yield mask
    # Fused head by head: the last part of each head's rows is its values, one for each channel, or one for each pair of
    # a key and a value where several heads of queries share them.
    for values in {width, (rows - width) // 2}:
        for heads in (h for h in range(2, min(values, rows)) if values % h == 0 and rows % h == 0):
            mask = place % (rows // heads) >= (rows - values) // heads
            if _is_linear(base, doubled(mask)):
                yield mask
