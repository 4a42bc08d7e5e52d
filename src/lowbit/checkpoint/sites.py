"""Sites: the places of a model that is being loaded where a packed weight goes.

transformers builds a model without weights and hands them over one tensor at a time. Here each tensor either is packed
at once and let go (`Packing`: the checkpoint is in full precision) or is put in place as it is (`Reading`: the
checkpoint is packed). In both cases the dense module stays until its weight is there and is then replaced, together
with all modules tied to it; two weights make a module of experts, so the first waits for the second.

transformers must not see packed weights as missing: their names are taken out of its set of missing keys and out of
its list of ties.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import nn

from lowbit.algorithms.rtn import relative_error
from lowbit.checkpoint import compressed
from lowbit.checkpoint.form import ASIDE
from lowbit.checkpoint.ranges import read_ranges_
from lowbit.errors import CheckpointError, RecipeError, WeightError
from lowbit.formats import Format, format_from_name
from lowbit.interop.imatrix import read_importance
from lowbit.layers import LowBitLinear, PackedWeight
from lowbit.methods import OWN_METHOD
from lowbit.models.walk import Target, dense_weights, find_targets, stored_order, up_name
from lowbit.packing import BUFFERS, PackedTensor
from lowbit.quantize import left_out, nothing_packed, pack_weight, plan, warn_about_idle_exceptions
from lowbit.recipe import Choice, Recipe
from lowbit.report import Report
from lowbit.schemes import ACTIVATIONS, scheme_of
from lowbit.swap import low_bit_module, replace_module

# A second copy of a tied weight that the packed first one explains this much worse is another weight.
_ANOTHER_WEIGHT = 1.5


class Sites:
    """The targets of a model, by the name that the checkpoint gives to their dense weights."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.targets = _with_ties(model, find_targets(model))
        self.by_name = {name: (target, suffix) for target in self.targets for name, suffix in _weight_names(target)}
        self.halves: dict[str, dict[str, PackedWeight]] = {}
        self.placed: dict[str, list[PackedWeight]] = {}
        self.missing: set[str] = set()
        self.shapes = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}

    def check_shapes(self) -> None:
        """Refuse dense weights of another shape than the model's: some versions of transformers let them pass."""
        for name, tensor in self.model.named_parameters():
            expected = self.shapes.get(name)
            if expected is not None and tuple(tensor.shape) != expected:
                raise CheckpointError(
                    f"{name} has shape {list(tensor.shape)} in the checkpoint and {list(expected)} by config.json; "
                    "the weights and the configuration are not of the same model"
                )

    def group(self, target: Target) -> list[Target]:
        """All targets that share one weight."""
        owner = target.tied_to or target.path
        return [t for t in self.targets if (t.tied_to or t.path) == owner]

    def place(self, target: Target, suffix: str, weight: PackedWeight, missing: set[str] | None) -> None:
        """Put a packed weight in the place of a dense one and of all that are tied to it."""
        self.missing = self.missing if missing is None else missing
        weights = [weight]
        if target.role == "experts":
            half = self.halves.setdefault(target.path, {})
            half[suffix] = weight
            self._found(f"{target.path}.{suffix}")
            if len(half) < 2:
                return
            weights = [half[up_name(target.module)], half["down_proj"]]
        for tied in self.group(target):
            self.replace(tied, weights)

    def replace(self, target: Target, weights: list[PackedWeight]) -> None:
        new = low_bit_module(target, weights)
        for module in new.modules():
            # transformers gives random numbers to every module without this mark.
            module._is_hf_initialized = True  # type: ignore[assignment]
        replace_module(self.model, target.path, new)
        self.placed[target.path] = weights
        for name, _ in _weight_names(target):
            self._found(name)

    def _found(self, name: str) -> None:
        self.missing.discard(name)
        getattr(self.model, "all_tied_weights_keys", {}).pop(name, None)

    def settle_biases(self) -> None:
        """Biases of packed layers are frozen; one that the checkpoint did not have is zero."""
        for path in self.placed:
            module = self.model.get_submodule(path)
            if isinstance(module, LowBitLinear) and module.bias is not None:
                module.bias.requires_grad_(False)
                if f"{path}.bias" in self.missing:
                    nn.init.zeros_(module.bias)


class Packing(Sites):
    """Packs the weights of a checkpoint in full precision as they come."""

    def __init__(self, model: nn.Module, recipe: Recipe, imatrix: str | Path | None = None) -> None:
        super().__init__(model)
        importance = {} if imatrix is None else read_importance(imatrix, cast(Any, model).config.model_type)
        self.recipe = recipe
        self.report = Report(recipe=recipe.title)
        self.choices: dict[str, Choice] = {t.path: plan(t, self.targets, recipe) for t in self.targets}
        for target in self.targets:
            found = importance.get(target.path)
            if found is not None and target.role in ("linear", "head"):
                self.choices[target.path] = _weighed(target, self.choices[target.path], found)
        warn_about_idle_exceptions([target.path for target in self.targets], recipe)

    def wants(self, name: str) -> bool:
        site = self.by_name.get(name)
        return site is not None and bool(self.choices[site[0].path].formats)

    def pack(self, name: str, weight: torch.Tensor, missing: set[str] | None) -> None:
        """Pack one dense weight of the checkpoint."""
        target, suffix = self.by_name[name]
        expected = tuple(getattr(target.module, suffix).shape)
        if tuple(weight.shape) != expected:
            raise CheckpointError(
                f"{name} has shape {list(weight.shape)} in the checkpoint and {list(expected)} by config.json; "
                "the weights and the configuration are not of the same model"
            )
        ordered = stored_order(target, weight)
        if target.path in self.placed and self._is_same(target, ordered):
            return
        # The report names a tied weight by its first place, whichever copy the checkpoint has.
        named = target if target.path in self.placed else self.group(target)[0]
        row_name = _held_path(named, suffix)
        packed = pack_weight(row_name, ordered, self.choices[target.path], self.recipe, self.report, named.role)
        held = PackedWeight(packed, weight.dtype)
        if target.path in self.placed:
            self.replace(target, [held])
        else:
            self.place(target, suffix, held, missing)

    def _is_same(self, target: Target, weight: torch.Tensor) -> bool:
        """Whether a second copy of a tied weight says the same as the first."""
        first = self.placed[target.path][0].packed()
        owners = {t.path for t in self.group(target)}
        error = next(row.error for row in self.report.layers if row.path in owners)
        return relative_error(weight, first) <= _ANOTHER_WEIGHT * error + 1e-6

    def finish(self) -> Report:
        """Pack what the loader made from several tensors, and account for the rest."""
        for target in self.targets:
            if self.choices[target.path].formats and target.path not in self.placed:
                self._pack_or_skip(target)
            elif target.path not in self.placed:
                self._skip(target, self.choices[target.path].reason)
        if not self.report.layers:
            raise RecipeError(nothing_packed(self.report))
        self.settle_biases()
        return self.report

    def _pack_or_skip(self, target: Target) -> None:
        names = [name for name, _ in _weight_names(target)]
        lost = [name for name in names if name in self.missing]
        if not lost:
            with torch.no_grad():
                for suffix, _ in list(dense_weights(target)):
                    name = f"{target.path}.{suffix}"
                    self.pack(name, getattr(target.module, suffix).detach(), None)
        elif re.search(r"\.\d+\.", names[0]):
            raise CheckpointError(
                f"the checkpoint lacks {lost[0]}; it is incomplete, or of another model than config.json says"
            )
        else:
            self._skip(target, "it is not in the checkpoint and starts from random numbers")

    def _skip(self, target: Target, reason: str) -> None:
        self.report.skipped.append(left_out(target, reason))


def _weighed(target: Target, choice: Choice, importance: NDArray[np.float32]) -> Choice:
    """A choice with the importance of the inputs that its weight has."""
    _, weight = next(iter(dense_weights(target)))
    if len(importance) != weight.shape[-1]:
        raise CheckpointError(
            f"the importance matrix has {len(importance)} inputs for {target.path}, which has {weight.shape[-1]}: "
            "it was measured on another model"
        )
    return dataclasses.replace(choice, importance=torch.from_numpy(importance))


class Reading(Sites):
    """Puts the packed weights of a low-bit checkpoint in place."""

    def __init__(self, model: nn.Module, fields: dict[str, Any], folder: Path | None = None) -> None:
        super().__init__(model)
        self.fields, self.folder = fields, folder
        self.own = fields["quant_method"] == OWN_METHOD
        ours = fields if self.own else fields.get(OWN_METHOD) or {}
        tied = ours.get("tied") or {}
        self.targets = [dataclasses.replace(t, tied_to=tied.get(t.path, t.tied_to)) for t in self.targets]
        self.by_name = {name: (target, suffix) for target in self.targets for name, suffix in _weight_names(target)}
        self.formats: dict[str, Any] = self._own_formats() if self.own else self._schemes()
        self.beside = Beside.found(folder, ours.get("packed") or {})
        # Dense copies of weights that are also there packed, in a tied head or in the file beside. Never read.
        self.copies = [] if self.own else [f"{owner}.weight" for owner in (*tied.values(), *self.beside.formats)]

    def _own_formats(self) -> dict[str, Any]:
        layers = self.fields.get("layers") or {}
        found = {path: format_from_name(name) for name, paths in layers.items() for path in paths}
        for target in self.targets:
            if target.tied_to in found:
                found[target.path] = found[target.tied_to]
        return found

    def _schemes(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for target in self.targets:
            experts = target.role == "experts"
            path = f"{target.path}.0.down_proj" if experts else target.path
            classes = ("Linear",) if experts else tuple(kind.__name__ for kind in type(target.module).__mro__)
            scheme = scheme_of(path, classes, self.fields)
            if scheme is not None and target.role in ("linear", "head", "embedding", "experts"):
                found |= {_held_path(target, suffix): scheme for _, suffix in _weight_names(target)}
        return found

    @property
    def integers(self) -> bool:
        """Whether weights lie in the checkpoint as int8 under the names of dense ones."""
        return not self.own and any(scheme.get(ACTIVATIONS) for scheme in self.formats.values())

    def wants(self, name: str) -> bool:
        site = self.by_name.get(name)
        return site is not None and _held_path(*site) in self.formats

    def leaves(self, name: str) -> bool:
        """Whether a weight is dense in the checkpoint, and stays so."""
        return not self.wants(name) and name not in self.copies

    def read(self, name: str, tensors: dict[str, torch.Tensor], missing: set[str] | None) -> None:
        """Put one packed weight in place; `tensors` are its buffers by the names of its form."""
        target, suffix = self.by_name[name]
        path = _held_path(target, suffix)
        if target.path in self.placed or (name in self.copies and path not in self.beside.formats):
            return
        if path not in self.formats and path not in self.beside.formats:
            raise CheckpointError(f"{path} is packed in the checkpoint, but config.json does not say how")
        dense = getattr(target.module, suffix)
        shape = tuple(stored_order(target, dense).shape)
        try:
            if path in self.beside.formats:
                packed = self.beside.read(path, shape, next(iter(tensors.values())).device)
            else:
                packed = self._packed(path, tensors, shape)
        except WeightError as error:
            raise CheckpointError(f"{path}: {error}; the weights and config.json are not of the same model") from None
        self.place(target, suffix, PackedWeight(packed, dense.dtype), missing)

    def _packed(self, path: str, tensors: dict[str, torch.Tensor], shape: tuple[int, ...]) -> PackedTensor:
        if not self.own:
            return compressed.from_tensors(path, tensors, shape, self.formats[path])
        lacking = [part for part in _parts_of(self.formats[path]) if part not in tensors]
        if lacking:
            raise CheckpointError(f"{path}: the checkpoint lacks its {lacking[0]}; it is incomplete")
        return PackedTensor(self.formats[path], shape, **{n: t for n, t in tensors.items() if n in BUFFERS})

    def finish(self) -> None:
        """Refuse a checkpoint that lacks a weight which its configuration promises."""
        for name, (target, suffix) in self.by_name.items():
            if target.path not in self.placed and _held_path(target, suffix) in self.formats:
                raise CheckpointError(f"the checkpoint lacks the packed weight {name} that config.json promises")
        self.settle_biases()
        if self.folder is not None:
            read_ranges_(self.model, self.folder)


@dataclass(frozen=True)
class Beside:
    """Weights that are dense in a checkpoint, for other readers, and packed in a file beside it."""

    file: Path
    formats: dict[str, Format]

    @classmethod
    def found(cls, folder: Path | None, names: dict[str, str]) -> Beside:
        """What a configuration names, if the file is there: a folder may have been copied without it."""
        file = Path(ASIDE) if folder is None else folder / ASIDE
        there = folder is not None and file.exists()
        return cls(file, {path: format_from_name(name) for path, name in names.items()} if there else {})

    def read(self, path: str, shape: tuple[int, ...], device: torch.device) -> PackedTensor:
        try:
            with safe_open(self.file, framework="pt") as opened:
                keys = {key for key in opened.keys() if key.rpartition(".")[0] == path}  # noqa: SIM118
                tensors = {key.rpartition(".")[2]: opened.get_tensor(key).to(device) for key in keys}
        except SafetensorError as error:
            raise CheckpointError(f"{self.file} cannot be read: {error}; get it again") from None
        lacking = [part for part in _parts_of(self.formats[path]) if part not in tensors]
        if lacking:
            raise CheckpointError(f"{self.file} lacks the {lacking[0]} of {path}; it is incomplete")
        return PackedTensor(self.formats[path], shape, **tensors)


def _parts_of(format: Format) -> Iterator[str]:
    """The buffers that a weight of a format cannot be without."""
    yield "codes"
    if format.kind != "kquant":
        yield "scales"
    if not format.symmetric:
        yield "zeros"
    if format.scale_block or format.has_global_scale:
        yield "scale_scales"
    if format.fixed_range:
        yield "input_range"


def _held_path(target: Target, suffix: str) -> str:
    return f"{target.path}.{suffix}" if target.role == "experts" else target.path


def _weight_names(target: Target) -> list[tuple[str, str]]:
    """The names of a target's dense weights, in full and within its module."""
    suffixes = (up_name(target.module), "down_proj") if target.role == "experts" else ("weight",)
    return [(f"{target.path}.{suffix}", suffix) for suffix in suffixes]


def _with_ties(model: nn.Module, targets: list[Target]) -> list[Target]:
    """transformers ties weights only after loading, so before that its own list says what belongs together."""
    ties: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    paths = {target.path for target in targets}
    found = []
    for target in targets:
        owner = ties.get(f"{target.path}.weight", "").removesuffix(".weight")
        tied = owner if owner in paths and owner != target.path else target.tied_to
        found.append(dataclasses.replace(target, tied_to=tied))
    return found
