"""Weights of a block as they are rounded: which of them together, and what becomes a line of the report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from lowbit.algorithms.rtn import relative_error
from lowbit.formats import Format
from lowbit.models.walk import Target, dense_weights
from lowbit.packing import PackedTensor
from lowbit.report import LayerReport

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


def linears_of(chosen: Mapping[str, Chosen], group: list[str]) -> list[str]:
    """Those of a group that are one matrix each: experts have inputs of their own."""
    return [path for path in group if chosen[path].target.role != "experts"]


def by_formats(chosen: Mapping[str, Chosen], group: list[str]) -> list[list[str]]:
    """The linears of one input, those of one format together if its rows have nothing to do with one another."""
    found: dict[object, list[str]] = {}
    for path in group:
        formats = chosen[path].formats
        together = len(formats) == 1 and rows_are_apart(formats[0])
        found.setdefault((formats, "" if together else path), []).append(path)
    return list(found.values())


def rows_are_apart(format: Format) -> bool:
    return not (format.scale_block or format.has_global_scale or format.group_size == 0)


def width_of(target: Target) -> int:
    return int(next(dense_weights(target))[1].shape[-1])
