"""The points of a grid: which code is nearest to a number, and what a code stands for before its scale is applied.

    nearest_codes    clamp(round(w / s) + z, 0, 2^bits - 1)         codebooks: the nearest level of w / s
    code_values      q - z                                          codebooks: levels[q]

`grid.py` chooses the scales. These are element by element, and read nothing back from a GPU.
"""

from __future__ import annotations

from functools import cache

import torch

from lowbit.formats import Format


def code_values(codes: torch.Tensor, zeros: torch.Tensor | None, format: Format) -> torch.Tensor:
    """What codes stand for before the scale is applied, in fp32."""
    if format.levels:
        return _levels(format, codes.device)[codes.int()]
    return codes.float() - (format.midpoint if zeros is None else zeros)


def nearest_codes(w: torch.Tensor, step: torch.Tensor, zero: torch.Tensor | None, format: Format) -> torch.Tensor:
    """The codes nearest to fp32 weights, under scales and zero points laid out beside them."""
    if format.levels:
        return _nearest_levels(w / step, format)
    if format.fine_zeros and zero is not None:
        return (w / step + zero.float()).round().clamp(0, format.max_code)
    offset = format.midpoint if zero is None else zero.float()
    return ((w / step).round() + offset).clamp(0, format.max_code)


@cache
def _levels(format: Format, device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):
        return torch.tensor(format.levels, dtype=torch.float32, device=device)


@cache
def _middles(format: Format, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """What lies halfway between the levels of a format, and their codes, both by rising level."""
    pairs = sorted((value, code) for code, value in enumerate(format.levels) if value == value)
    with torch.inference_mode(False):
        values = torch.tensor([p[0] for p in pairs], dtype=torch.float32, device=device)
        codes = torch.tensor([p[1] for p in pairs], dtype=torch.uint8, device=device)
        return (values[1:] + values[:-1]) / 2, codes


def _nearest_levels(x: torch.Tensor, format: Format) -> torch.Tensor:
    """The code of the level nearest to each x; a tie goes to the lower level."""
    middles, codes = _middles(format, x.device)
    return codes[torch.bucketize(x, middles)]


def round_zeros(zeros: torch.Tensor, format: Format) -> torch.Tensor:
    """The nearest zero points, in codes, that can be stored."""
    return ((zeros / format.zero_step).round() * format.zero_step).clamp(0, format.max_zero)
