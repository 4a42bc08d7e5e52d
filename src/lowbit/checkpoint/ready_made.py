"""Weights that somebody else packed, put into a model that is there: state dicts of GPTQ, AWQ and AutoRound.

    tensors, config = read_folder("model-gptq")          files, and what their configuration says
    place_(model, tensors, Packing.of(config))           linears become low-bit, dense tensors are taken over

One word of a configuration says how zero points are stored (facts of 2026-11): GPTQ's files less one, `gptq_v2` as they are;
AutoRound's less one where its packing is `auto_round:auto_gptq`, else as they are. Some files of the second kind carry the name of
the first: where a configuration says that weights are symmetric, the middle tells which it is.

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

from lowbit.contents import CONFIG, missing, quantization_config, read_json
from lowbit.errors import CheckpointError, RecipeError, nearest
from lowbit.formats import Format
from lowbit.interop import awq, gptq
from lowbit.layers import PackedWeight
from lowbit.models.walk import Target, find_targets, stored_order
from lowbit.packing import PackedTensor
from lowbit.quantize import left_out
from lowbit.report import LayerReport, Report
from lowbit.swap import low_bit_module, replace_module

METHODS = ("gptq", "awq", "rtn", "auto-round", "intel/auto-round")
_PATTERNS = ("*.safetensors", "*.pt", "*.pth", "*.bin")
_CONFIGS = ("quant_config.json", "quantize_config.json")
# The words for AWQ's layout "gemm"; the others ("gemv", ...) lie otherwise, in tensors that may have the same shapes.
_GEMM = ("", "gemm", "exllama", "ipex")
# What GPTQ's tensors are called where they lie otherwise, prepared for one kernel.
_PREPARED = ("marlin", "bitblas")
# The words of AutoRound's packings that are GPTQ's tensors, and by how much zero points are less there.
_AUTO_ROUND = {"auto_round": 0, "gptqmodel": 0, "exllamav2": 0, "auto_gptq": 1, "gptq": 1}
_LEFT = "the checkpoint has it in full precision"


@dataclass(frozen=True)
class Packing:
    """How a state dict is packed. `group_size` and `bits`: what somebody says about it, which is held against the tensors."""

    method: str = "gptq"
    group_size: int | None = None
    zero_shift: int = 1
    act_order: bool | None = None
    bits: int | None = None
    symmetric: bool | None = None

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Packing:
        """From a quantization_config."""
        named = str(config.get("quant_method") or ("awq" if "w_bit" in config else "gptq"))
        if named not in METHODS:
            raise CheckpointError(f"a checkpoint packed by {named!r} is not read: {nearest(named, METHODS)}")
        method, shift = _layout_of(named, config)
        group = config.get("group_size", config.get("q_group_size"))
        return cls(
            method, None if group is None else int(group), shift, config.get("desc_act"), None, config.get("sym")
        )


def _layout_of(method: str, config: Mapping[str, Any]) -> tuple[str, int]:
    """Whose tensors they are, GPTQ's or AWQ's, and by how much zero points are stored less."""
    backend = str(config.get("packing_format") or config.get("backend") or "")
    layout = str(config.get("checkpoint_format") or "")
    if "auto-round" in method:
        words = [word for word in backend.split(":") if word]
        if any("awq" in word for word in words):
            return "awq", 0
        if any(word not in _AUTO_ROUND for word in words):
            raise CheckpointError(
                f"a checkpoint that AutoRound packed as {backend!r} is not read: pack it as auto_round:auto_gptq"
            )
        return "gptq", max((_AUTO_ROUND[word] for word in words), default=0)
    if method == "awq":
        version = str(config.get("version") or "").lower()
        if version not in _GEMM:
            raise CheckpointError(
                f"a checkpoint of AWQ in the layout {version!r} is not read: the one called 'gemm' is"
            )
        return "awq", 0
    if any(word in layout or config.get(f"is_{word}_format") for word in _PREPARED):
        raise CheckpointError(
            f"a checkpoint of GPTQ prepared for one kernel ({layout or 'marlin'}) is not read: take it as 'gptq'"
        )
    return "gptq", 0 if "v2" in layout else 1


def packing_fields(folder: Path) -> dict[str, Any] | None:
    """What a folder says about how it is packed: in its config.json, or in a file beside it, as older ones do."""
    found = quantization_config(read_json(folder / CONFIG)) if (folder / CONFIG).is_file() else None
    for name in _CONFIGS:
        if found is None and (folder / name).is_file():
            found = read_json(folder / name)
    return found


def read_folder(folder: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors of a folder's files, and its quantization_config. Files of torch are read as tensors and nothing else."""
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise CheckpointError(f"{folder} is no folder with a low-bit checkpoint" if path.exists() else missing(path))
    config = packing_fields(path)
    if config is None:
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
    outputs, inputs = stored_order(target, target.module.weight).shape  # type: ignore[arg-type]
    shape = (int(outputs), int(inputs))
    weight = read_parts(path, parts, shape, packing)
    check_group(path, weight.format, packing.group_size, shape[1])
    if packing.bits is not None and packing.bits != weight.format.bits:
        raise RecipeError(
            f"{path}: the checkpoint has {weight.format.bits} bits, and {packing.bits} were said: say the type of that width, "
            "or take the checkpoint of the other"
        )
    return weight


def read_parts(path: str, parts: Mapping[str, torch.Tensor], shape: tuple[int, int], packing: Packing) -> PackedTensor:
    """A weight [out, in] from its tensors by the last part of their names."""
    if packing.method == "awq":
        return awq.read_awq(path, parts, shape)
    ignored = {gptq.GROUP_OF_INPUT} if packing.act_order is False else set()
    known = {name: part for name, part in parts.items() if name not in ignored}
    weight = gptq.read_gptq(path, known, shape, packing.zero_shift)
    if packing.symmetric and packing.zero_shift and _is_above_the_middle(weight):
        return gptq.read_gptq(path, known, shape, 0)
    return weight


def _is_above_the_middle(weight: PackedTensor) -> bool:
    """Whether every zero point is one more than the middle: that of a symmetric weight, stored as it is."""
    return weight.zeros is not None and bool((weight.zeros == (1 << weight.format.bits - 1) + 1).all())


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
