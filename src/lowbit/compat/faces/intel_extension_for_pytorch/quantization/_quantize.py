"""`prepare` and `convert`: a model that watches its inputs, and the low-bit model that is made of what it saw.

    prepared = prepare(model, qconfig, example_inputs=x)     the same numbers, with observers
    prepared(batch) ...                                      the caller's own loop
    prepared.save_qconf_summary(qconf_summary="q.json")      load_qconf_summary reads one instead of calibrating
    low_bit = convert(prepared)

Configurations for weights alone and dynamic ones need no loop. The copy that `inplace=False` makes shares all numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowbit.checkpoint.layout import held_weights
from lowbit.compat.faces.intel_extension_for_pytorch.frontend import check_module
from lowbit.compat.faces.intel_extension_for_pytorch.quantization import _qconfig as configs
from lowbit.compat.faces.intel_extension_for_pytorch.quantization._qconfig import StageError
from lowbit.compat.faces.intel_extension_for_pytorch.quantization._weight_only import make_weight_only_
from lowbit.compat.missing import refuse_unknown
from lowbit.compat.names import WORKS, Name
from lowbit.formats import as_format
from lowbit.interop.qconf_summary import LinearSummary, read_summary, write_summary
from lowbit.models.folding import ScalingGroup
from lowbit.observed import Watch, check_summary, find_model_groups, quantize_from_summary_
from lowbit.optimize import optimize_model
from lowbit.recipe import Recipe
from lowbit.swap import copy_model

_DYNAMIC = as_format("w8a8")
# Convolutions hold 8 bits too; they are unpacked for each call.
_CONV = as_format("int8_channel")
_ATTRIBUTES = ("lowbit_stage", "save_qconf_summary", "load_qconf_summary")
# The empty cache that scripts of that library hand in has four tensors for each layer, the last of them for beams.
_PRIVATE_CACHE = 4


class Stage:
    """What `prepare` knows until `convert`."""

    def __init__(self, model: nn.Module, configure: Any, settings: Any) -> None:
        self.settings = settings
        self.left = configs.left_out(configure)
        self.alpha = configs.smoothing_of(settings) if self.is_static else None
        self.groups: list[ScalingGroup] = []
        self.loaded: list[LinearSummary] | None = None
        self.watch: Watch | None = None
        self._model = model
        self._hook: Any = None

    @property
    def is_static(self) -> bool:
        return not configs.is_weight_only(self.settings) and not configs.is_dynamic(self.settings)

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Run the model once to see that it takes such inputs and where smoothing folds; then watch."""
        self._hook = self._model.register_forward_pre_hook(drop_private_cache, with_kwargs=True)
        with torch.no_grad():
            self._model(*args, **kwargs)
        if self.alpha is not None:
            self.groups = find_model_groups(self._model, args, kwargs)
        self.watch = Watch(self._model, self.settings.activation if self.alpha is None else None)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The model as it was before `prepare`."""
        assert self.watch is not None
        self._hook.remove()
        with self.watch.paused():
            yield
        self._hook = self._model.register_forward_pre_hook(drop_private_cache, with_kwargs=True)

    def end(self) -> None:
        if self.watch is not None:
            self.watch.remove()
            self._hook.remove()

    def summary(self) -> list[LinearSummary]:
        """What was loaded, or else what was seen."""
        if self.loaded is not None:
            return self.loaded
        assert self.watch is not None
        if not self.watch.seen:
            raise StageError(
                "the prepared model has not been run yet: run it on some samples before convert or save_qconf_summary, or "
                "load_qconf_summary a file"
            )
        left = [linear for name in self.left for linear in _paths_below(self._model, name)]
        return self.watch.summarize(self.alpha, self.groups, left)


def _paths_below(model: nn.Module, name: str) -> list[str]:
    return [path for path, _ in model.named_modules() if path == name or path.startswith(f"{name}.")]


def drop_private_cache(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Inputs without the empty cache of that library's own layout: a model makes its own."""
    kept = tuple(value for value in args if not _is_private_cache(value))
    return kept, {name: value for name, value in kwargs.items() if not _is_private_cache(value)}


def _is_private_cache(value: Any) -> bool:
    is_list = isinstance(value, tuple | list) and bool(value)
    return is_list and all(isinstance(layer, tuple | list) and len(layer) == _PRIVATE_CACHE for layer in value)


def prepare(
    model: nn.Module,
    configure: Any,
    example_inputs: Any = None,
    inplace: bool = False,
    bn_folding: bool = True,
    example_kwarg_inputs: dict[str, Any] | None = None,
) -> nn.Module:
    """A model that remembers between what ends the inputs of its linears lie."""
    check_module("ipex.quantization.prepare", model)
    settings = configs.settings_of(configure, "ipex.quantization.prepare")
    if held_weights(model):
        raise StageError("prepare was given a model that is low-bit already: prepare the one in full precision")
    if hasattr(model, "lowbit_stage"):
        raise StageError(
            "prepare was given a model that is prepared already: run it and convert it, or prepare the original"
        )
    prepared = model if inplace else copy_model(model)
    stage = Stage(prepared, configure, settings)
    if stage.is_static:
        args, kwargs = _inputs_of(example_inputs, example_kwarg_inputs)
        stage.begin(args, kwargs)
    prepared.save_qconf_summary = partial(_save, stage)  # type: ignore[assignment]
    prepared.load_qconf_summary = partial(_load, stage)  # type: ignore[assignment]
    prepared.lowbit_stage = stage  # type: ignore[assignment]
    return prepared


def _inputs_of(inputs: Any, kwargs: dict[str, Any] | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if inputs is None and kwargs is None:
        raise StageError(
            "a configuration with fixed ranges needs example_inputs or example_kwarg_inputs: prepare runs the model on them once"
        )
    if inputs is not None and kwargs is not None:
        raise StageError("prepare takes example_inputs or example_kwarg_inputs, not both")
    if kwargs is None and hasattr(inputs, "keys"):  # a dictionary, or what a tokenizer gives
        return (), dict(inputs)
    if kwargs is not None:
        return (), dict(kwargs)
    return (inputs,) if isinstance(inputs, torch.Tensor) else tuple(inputs), {}


def _refuse_without_ranges(stage: Stage) -> None:
    if not stage.is_static:
        raise StageError(
            "a summary holds ranges of activations, and this configuration has none to calibrate: convert the prepared model, or "
            "prepare it with the configuration of get_smooth_quant_qconfig_mapping"
        )


def _save(stage: Stage, qconf_summary: str | Path) -> None:
    """Write what was observed as JSON."""
    _refuse_without_ranges(stage)
    write_summary(qconf_summary, stage.summary(), configs.observer_settings(stage.settings))


def _load(stage: Stage, qconf_summary: str | Path) -> None:
    """Take what a file says for what was observed."""
    _refuse_without_ranges(stage)
    found = read_summary(qconf_summary)
    check_summary(stage._model, found)
    stage.loaded = found


def convert(model: nn.Module, inplace: bool = False) -> nn.Module:
    """The low-bit model that a prepared one becomes."""
    check_module("ipex.quantization.convert", model)
    stage: Any = getattr(model, "lowbit_stage", None)
    if stage is None:
        raise StageError("convert was given a model that nobody prepared: prepare(model, qconfig, ...) first")
    linears = stage.summary() if stage.is_static else []
    if inplace:
        stage.end()
        made = model
    elif stage.is_static:
        with stage.paused():
            made = _copy_without_stage(model)
    else:
        made = _copy_without_stage(model)
    for name in _ATTRIBUTES:
        vars(made).pop(name, None)
    if configs.is_weight_only(stage.settings):
        return make_weight_only_(made, stage.settings, stage.left)
    if stage.is_static:
        recipe = Recipe(_DYNAMIC, head=_DYNAMIC, conv=_CONV, name="w8a8 from a calibration")
        quantize_from_summary_(made, linears, stage.groups, recipe)
        return made
    return optimize_model(made, recipe=dynamic_recipe(), modules_to_not_convert=stage.left or None)


def dynamic_recipe() -> Recipe:
    return Recipe(_DYNAMIC, head=_DYNAMIC, name="w8a8")


def _copy_without_stage(model: nn.Module) -> nn.Module:
    kept = {name: vars(model).pop(name) for name in _ATTRIBUTES if name in vars(model)}
    try:
        return copy_model(model)
    finally:
        vars(model).update(kept)


__getattr__ = refuse_unknown(__name__, {})

_PLACE = "intel_extension_for_pytorch.quantization"
_UNIT = "tests/unit/test_compat_ipex_quantization.py::"
NAMES = (
    Name(
        f"{_PLACE}.prepare",
        "",
        WORKS,
        f"{_UNIT}test_two_stages",
        "lowbit.optimize_model(calibration=) does both stages",
    ),
    Name(f"{_PLACE}.prepare(example_inputs=)", "", WORKS, f"{_UNIT}test_two_stages"),
    Name(f"{_PLACE}.prepare(example_kwarg_inputs=)", "", WORKS, f"{_UNIT}test_two_stages"),
    Name(f"{_PLACE}.prepare(inplace=)", "", WORKS, f"{_UNIT}test_two_stages"),
    Name(
        f"{_PLACE}.prepare(bn_folding=)",
        "",
        WORKS,
        f"{_UNIT}test_a_convolution_and_a_linear",
        "norms stay as they are; torch.compile folds them",
    ),
    Name(f"{_PLACE}.convert", "", WORKS, f"{_UNIT}test_two_stages"),
    Name(f"{_PLACE}.convert(inplace=)", "", WORKS, f"{_UNIT}test_two_stages"),
)
