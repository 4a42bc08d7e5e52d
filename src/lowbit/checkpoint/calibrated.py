"""Load and calibrate in one step: a recipe that looks at activations, on a model that is read block by block.

transformers maps a checkpoint instead of copying it where the model computes in the type that was saved. So the model is
loaded in full precision first, which reads next to nothing; then each block is read when it is its turn, rounded, and let
go, and the pages of the files are given back. In memory at a time: what is packed so far, one block, its activations.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lowbit.blockwise import Where
from lowbit.calibration import Calibration, calibration_from, is_text
from lowbit.checkpoint.hf import Job, attach
from lowbit.checkpoint.hub import Found
from lowbit.checkpoint.pages import Pages
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


def pages_of(found: Found, folder: Path) -> Pages:
    """The pages that a load of a folder is about to map."""
    if found.files is None:
        return Pages(map(str, folder.glob("*.safetensors")))
    return Pages(str(found.path / name) for name in found.files if name.endswith(".safetensors"))


def calibrate_(model: Any, request: Request, calibration: Calibration, pages: Pages) -> None:
    """Round a model that was just loaded, and make it one that transformers knows how to treat."""
    assert request.recipe is not None
    choices = request.choices
    where = Where(choices.resume, choices.spill, pages)
    report = quantize_(model, request.recipe, choices.progress, False, calibration, where)
    attach(model, report, request.recipe, job=Job(choices.kernel, choices.compute))
