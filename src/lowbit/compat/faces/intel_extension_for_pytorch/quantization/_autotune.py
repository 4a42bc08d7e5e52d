"""`autotune`: the first 8-bit configuration of a model that keeps its accuracy within a criterion.

Candidates in order: each alpha, with every number of samples; then the best of these with the linears whose inputs suffer most
left in full precision, one, two, four and more of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lowbit.compat.faces.intel_extension_for_pytorch.quantization import _qconfig as configs
from lowbit.compat.faces.intel_extension_for_pytorch.quantization._qconfig import StageError
from lowbit.compat.faces.intel_extension_for_pytorch.quantization._quantize import Stage, prepare
from lowbit.compat.ignored import say_ignored
from lowbit.compat.missing import refuse_unknown
from lowbit.compat.names import IGNORED, WORKS, Name
from lowbit.interop.qconf_summary import LinearSummary
from lowbit.observed import Candidate, Criterion, quantize_from_summary_, tune
from lowbit.swap import copy_model

_OWNER = "ipex.quantization.autotune"
_ALPHAS = (0.5, 0.3, 0.7, 0.9)


def autotune(
    model: nn.Module,
    calib_dataloader: Iterable[Any],
    calib_func: Callable[[nn.Module], Any] | None = None,
    eval_func: Callable[[nn.Module], Any] | None = None,
    op_type_dict: dict[str, Any] | None = None,
    smoothquant_args: dict[str, Any] | None = None,
    sampling_sizes: Sequence[int] | None = None,
    accuracy_criterion: dict[str, float] | None = None,
    tuning_time: float = 0,
) -> nn.Module:
    """A prepared model, ready for `convert` or `save_qconf_summary`, with the configuration that was found."""
    if eval_func is None:
        raise StageError(f"{_OWNER} needs eval_func, which takes a model and gives its accuracy: higher is better")
    if op_type_dict:
        say_ignored(_OWNER, "op_type_dict", "linears get 8 bits, or none where tuning leaves them")
    criterion = Criterion(*next(iter((accuracy_criterion or {"relative": 0.01}).items())))  # type: ignore[arg-type]
    first = next(iter(calib_dataloader), None)
    if first is None:
        raise StageError(f"{_OWNER}: calib_dataloader gives nothing")
    search = _Search(model, calib_dataloader, calib_func, list(sampling_sizes or [100]), _inputs(first))
    alphas = _alphas(smoothquant_args)
    original = float(eval_func(model))
    found = tune(original, search.candidates(alphas), eval_func, criterion, tuning_time)
    alpha, summary = found.candidate.value
    prepared = search.prepare(alpha)
    stage: Stage = prepared.lowbit_stage  # type: ignore[assignment]
    stage.loaded = summary
    print(f"autotune: {found.candidate.name} keeps {found.accuracy:.4g} of {original:.4g} ({len(found.tried)} tried)")
    return prepared


def _alphas(smoothquant_args: dict[str, Any] | None) -> list[float | None]:
    """The alphas to try; None goes without smoothing."""
    given = (smoothquant_args or {}).get("alpha", "auto" if smoothquant_args else None)
    if given is None:
        return [None, *_ALPHAS]
    if isinstance(given, int | float):
        return [float(given)]
    if isinstance(given, str):
        settings = (smoothquant_args or {}).get("auto_alpha_args", {})
        if not settings:
            return [*_ALPHAS]
        low, high, step = (float(settings.get(f"alpha_{n}", d)) for n, d in (("min", 0.0), ("max", 1.0), ("step", 0.1)))
        count = round((high - low) / step) if step > 0 else 0
        return [float(settings.get("init_alpha", 0.5)), *(round(low + step * i, 4) for i in range(count + 1))]
    return [float(alpha) for alpha in given]


def _inputs(sample: Any) -> Any:
    """The inputs of a sample: without the label or the index of the last token that loaders put beside them."""
    if isinstance(sample, tuple | list) and len(sample) == 2 and not isinstance(sample[0], int | float):
        label = sample[1]
        if not isinstance(label, torch.Tensor) or not label.is_floating_point():
            return sample[0]
    return sample


def call_with(model: nn.Module, inputs: Any) -> Any:
    if hasattr(inputs, "keys"):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple | list) else model(inputs)


class _Search:
    """What is tried, made when its turn comes."""

    def __init__(self, model: nn.Module, loader: Iterable[Any], calibrate: Any, sizes: list[int], example: Any) -> None:
        self.model, self.loader, self.calibrate, self.sizes, self.example = model, loader, calibrate, sizes, example
        self.noises: dict[str, float] = {}

    def prepare(self, alpha: float | None) -> nn.Module:
        settings = (
            configs.default_static_qconfig_mapping if alpha is None else configs.get_smooth_quant_qconfig_mapping(alpha)
        )
        keywords = hasattr(self.example, "keys")
        inputs = {"example_kwarg_inputs" if keywords else "example_inputs": self.example}
        return prepare(self.model, settings, **inputs)

    def candidates(self, alphas: Sequence[float | None]) -> Iterator[Candidate]:
        tried = []
        for size, alpha in itertools.product(self.sizes, alphas):
            summary = self._calibrated(alpha, size)
            tried.append((alpha, summary))
            yield self._candidate(f"{_named(alpha)}, {size} samples", alpha, summary)
        alpha, summary = tried[0]
        worst = sorted(self.noises, key=lambda path: self.noises[path], reverse=True)
        count = 1
        while count < len(worst):
            left = set(worst[:count])
            kept = [_left(linear) if linear.path in left else linear for linear in summary]
            yield self._candidate(f"{_named(alpha)}, {count} linears in full precision", alpha, kept)
            count *= 2

    def _calibrated(self, alpha: float | None, size: int) -> list[LinearSummary]:
        prepared = self.prepare(alpha)
        stage: Stage = prepared.lowbit_stage  # type: ignore[assignment]
        with torch.no_grad():
            if self.calibrate is not None:
                self.calibrate(prepared)
            else:
                for sample in itertools.islice(self.loader, size):
                    call_with(prepared, _inputs(sample))
        summary = stage.summary()
        self.noises = self.noises or {linear.path: linear.noise for linear in summary if linear.noise is not None}
        stage.end()
        return summary

    def _candidate(self, name: str, alpha: float | None, summary: list[LinearSummary]) -> Candidate:
        def make() -> nn.Module:
            made = copy_model(self.model)
            quantize_from_summary_(made, summary)
            return made

        return Candidate(name, (alpha, summary), make)


def _named(alpha: float | None) -> str:
    return "no smoothing" if alpha is None else f"alpha {alpha:g}"


def _left(linear: LinearSummary) -> LinearSummary:
    return replace(linear, is_left=True)


__getattr__ = refuse_unknown(__name__, {})

_PLACE = "intel_extension_for_pytorch.quantization.autotune"
_UNIT = "tests/unit/test_compat_ipex_quantization.py::"
NAMES = (
    Name(_PLACE, "", WORKS, f"{_UNIT}test_autotune_meets_a_criterion"),
    *(
        Name(f"{_PLACE}({name}=)", "", WORKS, f"{_UNIT}test_autotune_meets_a_criterion")
        for name in (
            "calib_func",
            "eval_func",
            "smoothquant_args",
            "sampling_sizes",
            "accuracy_criterion",
            "tuning_time",
        )
    ),
    Name(f"{_PLACE}(op_type_dict=)", "", IGNORED, f"{_UNIT}test_autotune_meets_a_criterion", "linears get 8 bits"),
)
