"""Load and calibrate in one step: the model in full precision first, then low-bit block by block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lowbit.blockwise import Where
from lowbit.calibration import Calibration, calibration_from, is_text
from lowbit.checkpoint.hf import Job, attach
from lowbit.checkpoint.request import Request
from lowbit.options import SAMPLES
from lowbit.quantize import quantize_


def tokens_for(request: Request, tokenizer: Callable[[], Any]) -> Calibration | None:
    """What a request calibrates on; the tokenizer is only asked for where there is text."""
    source = request.choices.calibration
    if request.recipe is None or source is None:
        return None
    samples = getattr(request.recipe.rounder_options, "samples", SAMPLES)
    return calibration_from(source, tokenizer() if is_text(source) else None, samples)


def calibrate_(model: Any, request: Request, calibration: Calibration) -> None:
    """Round a model that was just loaded, and make it one that transformers knows how to treat."""
    assert request.recipe is not None
    choices = request.choices
    where = Where(choices.resume, choices.spill)
    report = quantize_(model, request.recipe, choices.progress, False, calibration, where)
    attach(model, report, request.recipe, job=Job(choices.kernel, choices.compute))
