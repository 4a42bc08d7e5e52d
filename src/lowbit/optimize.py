"""One line for a model that is already there: `optimize_model(model)`, and `explain(model)` for what became of it.

model = lowbit.optimize_model(model, low_bit="sym_int4")
model.lowbit_report                 what happened to every weight
model.save_low_bit("folder")        written so that transformers and others read it
print(lowbit.explain(model))        which kernel runs each layer, and why the faster ones refused
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from lowbit.blockwise import Where
from lowbit.bridge import EngineGenerate, attach_engine
from lowbit.calibration import calibration_from
from lowbit.checkpoint.hf_names import is_transformers_model
from lowbit.checkpoint.keywords import Choices, as_dtype, build_recipe, cast_of, known_keywords, refuse_idle_data
from lowbit.checkpoint.layout import held_weights
from lowbit.checkpoint.save import save_low_bit
from lowbit.core import calls
from lowbit.errors import RecipeError
from lowbit.formats import Format
from lowbit.kernels.table import CORE, refusals
from lowbit.layers import prepare_
from lowbit.quantize import finish, quantize_
from lowbit.recipe import Recipe
from lowbit.report import Report


def optimize_model(
    model: nn.Module,
    low_bit: str | Format | None = "sym_int4",
    optimize_llm: bool = True,
    modules_to_not_convert: list[str] | str | None = None,
    cpu_embedding: bool = False,
    **kwargs: Any,
) -> nn.Module:
    """Make a model low-bit in place; returns it.

    `low_bit` is a format or an old system's name for one; a plain dtype (`bf16`) casts the model, and None leaves it alone.
    `modules_to_not_convert` names layers to leave out, by any part of their path. `cpu_embedding` leaves the embedding dense.
    `optimize_llm` is kept for old scripts: kernels are chosen per layer in any case. Further keywords: the fields of `Choices`;
    `calibration` is what `lowbit.calibration.calibration_from` takes or gives, `resume` a folder for
    finished blocks, `spill` one for activations.
    """
    if not isinstance(model, nn.Module):
        raise RecipeError(f"optimize_model takes a torch module, not a {type(model).__name__}")
    choices = Choices(**known_keywords(kwargs, "optimize_model"))
    cast = cast_of(low_bit, choices)
    packs_nothing = cast is not None or (low_bit is None and choices.recipe is None)
    if packs_nothing:
        refuse_idle_data(choices)
    if cast is not None or choices.torch_dtype is not None:
        model.to(cast or as_dtype(choices.torch_dtype))
    if packs_nothing:
        attach_engine(model)
        # It refuses with the reason: there is nothing low-bit to save.
        model.save_low_bit = partial(save_low_bit, model)  # type: ignore[assignment]
        return model
    if held_weights(model):
        warnings.warn("the model is low-bit already and was left as it is", stacklevel=2)
        return model
    recipe = build_recipe(low_bit, modules_to_not_convert, cpu_embedding, choices)
    calibration = None if choices.calibration is None else calibration_from(choices.calibration)
    report = quantize_(model, recipe, choices.progress, False, calibration, Where(choices.resume, choices.spill))
    return settle_(model, report, recipe, choices.kernel, choices.compute)


def settle_(
    model: nn.Module, report: Report, recipe: Recipe, kernel: str | None = None, compute: str = "auto"
) -> nn.Module:
    """Make a model with packed weights one that is used: kernels chosen, a report and a recipe on it, ways to save it."""
    if is_transformers_model(model):
        from lowbit.checkpoint.hf import Job, attach

        attach(model, report, recipe, job=Job(kernel, compute))
        return model
    for held in held_weights(model):
        held.weight.compute = compute
    prepare_(model, kernel)
    finish(model, report, prepare=False)
    model.lowbit_recipe = recipe  # type: ignore[assignment]
    model.save_low_bit = partial(save_low_bit, model)  # type: ignore[assignment]
    return model


@dataclass(frozen=True)
class Row:
    """One packed weight: what runs it, and why each faster kernel does not."""

    path: str
    role: str
    format: str
    shape: tuple[int, ...]
    device: str
    kernel: str
    refused: tuple[tuple[str, str], ...] = ()
    compute: str = "auto"


@dataclass(frozen=True)
class Explanation:
    """Which kernel runs each packed weight of a model. Prints as a table, equal rows folded into one."""

    rows: list[Row] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    generate: str = ""
    prefill: str = ""

    def __str__(self) -> str:
        if not self.rows:
            return "no weight of this model is packed; optimize_model packs them"
        folded: dict[tuple[object, ...], list[Row]] = {}
        for row in self.rows:
            folded.setdefault((row.kernel, row.device, row.format, row.refused, row.compute), []).append(row)
        lines = []
        for first, *others in folded.values():
            more = f" and {len(others)} more" if others else ""
            asked = "" if first.compute == "auto" else f", computed in {first.compute}"
            lines.append(
                f"{first.kernel} on {first.device}: {first.format}, {first.path} {list(first.shape)}{more}{asked}"
            )
            lines += [f"    not {name}: {reason}" for name, reason in first.refused]
        lines += [f"dense: {path}: {reason}" for path, reason in self.skipped]
        lines += [f"prefill: {self.prefill}"] if self.prefill else []
        lines += [f"generate: {self.generate}"] if self.generate else []
        return "\n".join(lines)


def explain(model: nn.Module) -> Explanation:
    """Which kernel runs each packed weight, and why each kernel before it in the table refused."""
    rows = []
    folds = False
    for held in held_weights(model):
        weight = held.weight
        folds = folds or (weight.kernel is CORE and weight.compute == "auto")
        device = weight.device.type
        kernel = weight.kernel.name if weight.kernel else "chosen at first use"
        refused = []
        for name, reason in refusals(weight.format, weight.shape, device, weight.compute):
            if name == kernel:
                break
            if reason:
                refused.append((name, reason))
        stored = (held.path, held.role, weight.format.name, weight.shape)
        rows.append(Row(*stored, device, kernel, tuple(refused), weight.compute))
    report = getattr(model, "lowbit_report", None)
    skipped = [(row.path, row.reason) for row in report.skipped] if report else []
    return Explanation(rows, skipped, _explain_generate(model), calls.folding() if folds else "")


def _explain_generate(model: nn.Module) -> str:
    """Which loop a plain call of `generate` takes, and why."""
    generate = getattr(model, "generate", None)
    if not isinstance(generate, EngineGenerate):
        return ""
    reason = generate.model_refusal()
    if reason is not None:
        return f"transformers' own loop, since {reason}"
    plain = any(weight.dtype is torch.bfloat16 and weight.dim() > 1 for weight in model.parameters())
    rounded = calls.rounding() if plain and generate.compute == "auto" else ""
    return "; ".join(filter(None, [f"the engine of the compiled core, keys and values in {generate.cache}", rounded]))
