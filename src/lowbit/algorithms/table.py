"""What an algorithm is: a row of ROUNDERS or SCALERS (see `algorithms`), and what it is handed.

A rounder chooses codes and scales, for one weight from the statistics of its inputs (`round_weight`) or for all linears
of a block from what the block is called with (`round_block`). A scaler changes a block in place so that it computes the
same and rounds better (`scale_block_`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lowbit.algorithms.statistics import Statistics
from lowbit.formats import Format
from lowbit.models.capture import Call
from lowbit.packing import PackedTensor


@dataclass(frozen=True)
class Rounded:
    """A packed weight, and what its line of the report says beside its error."""

    packed: PackedTensor
    note: str = ""


Tell = Callable[[str, float], None]


def unheard(what: str, share: float) -> None:
    """Nobody wants to know how far the work is."""


@dataclass
class BlockWork:
    """One block, and what an algorithm that sees all of it needs.

    `formats` names the linears to be rounded by their path inside the block, `experts` the weights of fused experts, and
    `shared` the parameters that belong to another block too. `calls` come out of the blocks before as they are after
    rounding; `targets` is what the block gives in full precision, and `full_calls` what it is called with there, for a row
    that asks for them. `tell` hears what is being done, and which share of the block's rounding that makes.
    """

    block: nn.Module
    formats: dict[str, Format]
    calls: list[Call]
    targets: list[torch.Tensor] = field(default_factory=list)
    full_calls: list[Call] = field(default_factory=list)
    experts: dict[str, Format] = field(default_factory=dict)
    shared: frozenset[str] = frozenset()
    tell: Tell = unheard


RoundWeight = Callable[[torch.Tensor, Format, Statistics | None, Any], Rounded]
RoundBlock = Callable[[BlockWork, Any], dict[str, Rounded]]
ScaleBlock = Callable[[BlockWork, Any], dict[str, str]]


def _never(options: Any) -> bool:
    return False


@dataclass(frozen=True)
class Rounder:
    """`hessian`: whether statistics hold H. `full`: whether options ask for what the block computes in full precision."""

    round_weight: RoundWeight | None = None
    round_block: RoundBlock | None = None
    hessian: bool = False
    full: Callable[[Any], bool] = _never


@dataclass(frozen=True)
class Scaler:
    """`scale_block_` gives notes for the report, by the path of a linear inside the block."""

    scale_block_: ScaleBlock
