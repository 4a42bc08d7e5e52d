"""Weights that somebody else packed, put into a model that is there: state dicts of GPTQ and AWQ.

    tensors, config = read_folder("model-gptq")          files, and what their configuration says
    place_(model, tensors, Packing.of(config))           linears become low-bit, dense tensors are taken over

A linear that the state dict has no codes for stays dense, with the numbers of the state dict where it has some (AWQ folds scales
into norms). What is packed is not rounded again.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowbit.contents import CONFIG, read_json
from lowbit.errors import CheckpointError, RecipeError, nearest
from lowbit.formats import Format
from lowbit.interop import awq, gptq
from lowbit.layers import PackedWeight
from lowbit.models.walk import Target, find_targets
from lowbit.packing import PackedTensor
from lowbit.quantize import left_out
from lowbit.report import LayerReport, Report
from lowbit.swap import low_bit_module, replace_module

METHODS = ("gptq", "awq", "rtn", "auto-round", "intel/auto-round")
_PATTERNS = ("*.safetensors", "*.pt", "*.pth", "*.bin")
_CONFIGS = ("quant_config.json", "quantize_config.json")
_LEFT = "the checkpoint has it in full precision"


@dataclass(frozen=True)
class Packing:
    """How a state dict is packed. `group_size` and `bits`: what somebody says about it, which is held against the tensors."""

    method: str = "gptq"
    group_size: int | None = None
    zero_shift: int = 1
    act_order: bool | None = None
    bits: int | None = None

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Packing:
        """From a quantization_config."""
        method = str(config.get("quant_method", "gptq"))
        if method not in METHODS:
            raise CheckpointError(f"a checkpoint packed by {method!r} is not read: {nearest(method, METHODS)}")
        backend = str(config.get("backend") or config.get("packing_format") or "")
        if "auto-round" in method:
            method = "awq" if "awq" in backend else "gptq"
        version = f"{config.get('checkpoint_format', '')}{backend}"
        group = config.get("group_size", config.get("q_group_size"))
        return cls(
            "awq" if method == "awq" else "gptq",
            None if group is None else int(group),
            0 if "v2" in version else 1,
            config.get("desc_act"),
        )


def read_folder(folder: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors of a folder's files, and its quantization_config. Files of torch are read as tensors and nothing else."""
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise CheckpointError(f"{folder} is no folder with a low-bit checkpoint")
    config = read_json(path / CONFIG).get("quantization_config") if (path / CONFIG).is_file() else None
    for name in _CONFIGS:
        if config is None and (path / name).is_file():
            config = read_json(path / name)
    if not isinstance(config, dict):
        raise CheckpointError(f"{folder} says nowhere how it is packed: its {CONFIG} needs a quantization_config")
    files = next((found for pattern in _PATTERNS if (found := sorted(path.glob(pattern)))), [])
    if not files:
        raise CheckpointError(f"{folder} holds no weights ({', '.join(_PATTERNS)})")
    tensors: dict[str, torch.Tensor] = {}
    for file in files:
        tensors |= read_tensors(file)
    return tensors, config


def read_tensors(file: Path) -> dict[str, torch.Tensor]:
    """The state dict in a file; one that holds anything else than tensors is refused, and nothing of it runs."""
    if file.suffix == ".safetensors":
        from safetensors.torch import load_file

        found: dict[str, torch.Tensor] = load_file(file)
        return found
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise CheckpointError(f"{file} cannot be read as a state dict of tensors: {error}".splitlines()[0]) from None
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise CheckpointError(f"{file} holds something else than tensors, and is not read")
    return state


def place_(model: nn.Module, tensors: Mapping[str, torch.Tensor], packing: Packing) -> Report:
    """Put packed linears into a model, in place, and take over its dense tensors. Kernels are chosen by the caller."""
    by_module: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        module, _, part = name.rpartition(".")
        by_module.setdefault(module, {})[part] = tensor
    packed = [m for m, parts in by_module.items() if gptq.WEIGHT in parts or gptq.OLD_WEIGHT in parts]
    if not packed:
        raise CheckpointError(
            f"the state dict has no packed linear: names that end in {gptq.WEIGHT} are what GPTQ and AWQ write"
        )
    targets = {target.path: target for target in find_targets(model) if target.role in ("linear", "head")}
    lost = next((path for path in packed if path not in targets), None)
    if lost is not None:
        raise CheckpointError(f"the checkpoint packs {lost}, which this model does not have: {nearest(lost, targets)}")
    report = Report(recipe=f"{packing.method}, ready-made")
    with torch.no_grad():
        for path, target in targets.items():
            if path not in packed:
                report.skipped.append(left_out(target, _LEFT))
                continue
            weight = read_linear(path, by_module[path], target, packing)
            if "bias" in by_module[path] and getattr(target.module, "bias", None) is not None:
                target.module.bias.data = by_module[path]["bias"].to(_dtype(target))
            report.layers.append(_line(path, target, weight, packing.method))
            replace_module(model, path, low_bit_module(target, [PackedWeight(weight, _dtype(target))]))
        _take_over_dense_(model, tensors)
    return report


def _line(path: str, target: Target, weight: PackedTensor, method: str) -> LayerReport:
    """The line of the report. How far the packed weight is from the original, nobody here can tell."""
    dense: torch.Tensor = target.module.weight  # type: ignore[assignment]
    name, shape = weight.format.name, list(weight.shape)
    note = f"packed by {method}"
    return LayerReport(path, target.role, name, shape, dense.nbytes, weight.nbytes, float("nan"), note=note)


def _dtype(target: Target) -> torch.dtype:
    weight = target.module.weight
    assert isinstance(weight, torch.Tensor)
    return weight.dtype


def read_linear(path: str, parts: Mapping[str, torch.Tensor], target: Target, packing: Packing) -> PackedTensor:
    """The weight of one linear, from its tensors by the last part of their names."""
    module: Any = target.module
    shape = (int(module.out_features), int(module.in_features))
    if packing.method == "awq":
        weight = awq.read_awq(path, parts, shape)
    else:
        ignored = {gptq.GROUP_OF_INPUT} if packing.act_order is False else set()
        known = {name: part for name, part in parts.items() if name not in ignored}
        weight = gptq.read_gptq(path, known, shape, packing.zero_shift)
    check_group(path, weight.format, packing.group_size, shape[1])
    if packing.bits is not None and packing.bits != weight.format.bits:
        raise RecipeError(
            f"{path}: the checkpoint has {weight.format.bits} bits, and {packing.bits} were said: say the type of that width, "
            "or take the checkpoint of the other"
        )
    return weight


def check_group(path: str, format: Format, said: int | None, inputs: int) -> None:
    """Refuse tensors whose groups are of another size than somebody says."""
    if said is None:
        return
    found = inputs if format.group_size < 0 else format.group_size
    if (inputs if said < 0 else min(said, inputs)) != found:
        raise RecipeError(
            f"{path}: the checkpoint has groups of {found} inputs, and group_size={said} was said: "
            f"say group_size={format.group_size}, or take the checkpoint of that size"
        )


def _take_over_dense_(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """The dense tensors of a state dict, where the model has a place of the same shape for them."""
    for name, parameter in model.named_parameters():
        given = tensors.get(name)
        if given is None or not given.is_floating_point():
            continue
        if given.shape != parameter.shape:
            raise CheckpointError(
                f"the checkpoint is of another model: {name} is {list(given.shape)} there and {list(parameter.shape)} here"
            )
        parameter.data = given.to(parameter.dtype)
