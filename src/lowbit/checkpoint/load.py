"""Load: fill a model with the weights of a low-bit folder, and make models that have no weights yet.

    with lowbit.low_memory_init():
        model = MyModel()                               # shapes only: every tensor is on the meta device
    model = lowbit.load_low_bit(model, "folder")        # mapped from the files, nothing is read until it is used

A folder that `save_low_bit` wrote loads without knowing how the model was made low-bit: the folder says it.
transformers' own models load through their auto class in one step; `load_low_bit` is for a model that is already
there, of whatever kind.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

from lowbit.checkpoint.folder import check_folder, quantization_fields, refuse_pickles
from lowbit.checkpoint.hf_names import is_transformers_model
from lowbit.checkpoint.layout import dense_tensors, held_weights
from lowbit.checkpoint.old_saves import load_old_save, old_low_bit, read_old_save, refuse_untrusted
from lowbit.checkpoint.plain_save import attach_saving
from lowbit.checkpoint.save import save_low_bit
from lowbit.checkpoint.sites import Reading
from lowbit.contents import REPORT, file_names, read_json, weight_files
from lowbit.errors import CheckpointError
from lowbit.layers import prepare_
from lowbit.methods import OWN_METHOD
from lowbit.packing import BUFFERS
from lowbit.quantize import finish
from lowbit.recipe import Recipe
from lowbit.report import Report


def load_low_bit(model: nn.Module, folder: str | Path, allow_pickle: bool = False) -> nn.Module:
    """Fill a model with a saved low-bit one's weights, in place; returns it.

    `allow_pickle` lets a folder that BigDL-LLM or ipex-llm saved be read: as tensors, and nothing else.
    """
    path = Path(folder).expanduser()
    if old_low_bit(path) is not None:
        return _load_old(model, path, allow_pickle)
    check_folder(path)
    refuse_pickles(path, file_names(path))
    fields = quantization_fields(path)
    if fields is None:
        raise CheckpointError(
            f"{path} is a model in full precision; use from_pretrained(..., load_in_4bit=True) or optimize_model"
        )
    if is_transformers_model(model):
        return _load_like_transformers(model, path)
    if fields.get("quant_method") != OWN_METHOD:
        raise CheckpointError(f"{path} was saved from a transformers model, so it cannot fill a {type(model).__name__}")
    return _fill_(model, path, fields, _stored(path))


def _load_old(model: nn.Module, folder: Path, allow_pickle: bool) -> nn.Module:
    """Fill a model from a folder of the old systems."""
    refuse_untrusted(folder, allow_pickle)
    if is_transformers_model(model):
        return _become(model, load_old_save(type(model), folder, allow_pickle), folder)
    tensors, fields = read_old_save(folder, model)
    return _fill_(model, folder, fields, tensors.items())


def _load_like_transformers(model: Any, folder: Path) -> nn.Module:
    """Load a fresh model the one way that transformers' own loading goes, and let the given one become it."""
    return _become(model, type(model).from_pretrained(folder), folder)


def _become(model: Any, fresh: Any, folder: Path) -> nn.Module:
    """Let a model be another one of the same parts."""
    if _kinds(fresh) != _kinds(model):
        raise CheckpointError(f"{folder} holds a model of other parts than the {type(model).__name__} given")
    training = model.training
    vars(model).clear()
    vars(model).update(vars(fresh))
    attach_saving(model)
    model.train(training)
    return cast(nn.Module, model)


def _kinds(model: nn.Module) -> list[type]:
    """The classes of transformers that a model is made of."""
    return [type(module) for module in model.modules() if is_transformers_model(module)]


def _fill_(
    model: nn.Module, folder: Path, fields: dict[str, Any], stored: Iterable[tuple[str, torch.Tensor]]
) -> nn.Module:
    reading = Reading(model, fields, folder)
    packed: dict[str, dict[str, torch.Tensor]] = {}
    dense: dict[str, torch.Tensor] = {}
    for key, tensor in stored:
        path, _, part = key.rpartition(".")
        if part in BUFFERS and _dense_name(path) in reading.by_name:
            packed.setdefault(_dense_name(path), {})[part] = tensor
        else:
            dense[key] = tensor
    for name, tensors in packed.items():
        reading.read(name, tensors, None)
    reading.finish()
    _fill_dense_(model, dense, folder)
    report = Report.from_dict(read_json(folder / REPORT)) if (folder / REPORT).exists() else Report()
    prepare_(model)
    finish(model, report, prepare=False)
    model.lowbit_recipe = Recipe.from_dict(fields["recipe"]) if fields.get("recipe") else None  # type: ignore[assignment]
    model.save_low_bit = partial(save_low_bit, model)  # type: ignore[assignment]
    return model


def _stored(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor in a folder's safetensors, by name."""
    for file in weight_files(folder):
        try:
            with safe_open(file, framework="pt") as opened:
                for key in opened.keys():  # noqa: SIM118
                    yield key, opened.get_tensor(key)
        except SafetensorError as error:
            raise CheckpointError(f"{file} cannot be read: {error}; get it again") from None


def _dense_name(path: str) -> str:
    """The name of the dense weight whose packed buffers are under `path`."""
    return f"{path.removesuffix('.packed_weight')}.weight" if path.endswith(".packed_weight") else path


def _fill_dense_(model: nn.Module, tensors: dict[str, torch.Tensor], folder: Path) -> None:
    """Put the tensors that are not packed in their places."""
    own = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    for name, tensor in tensors.items():
        if name not in own:
            raise CheckpointError(
                f"{folder} holds {name}, which the model does not have; it was saved from another model"
            )
        if own[name].shape != tensor.shape:
            raise CheckpointError(
                f"{name} has shape {list(tensor.shape)} in {folder} and {list(own[name].shape)} in the model"
            )
    shared = {id(tensor): name for name, tensor in own.items() if name in tensors}
    packed = {name for h in held_weights(model) for name, _ in h.module.named_buffers()}
    saved = {name for name, _ in dense_tensors(model)}  # one that the folder lacks would keep the value it has
    for name, place in own.items():
        source = shared.get(id(place))
        if source is not None:
            _set(model, name, place, tensors[source])
        elif name in saved or (place.device.type == "meta" and name.rpartition(".")[2] not in packed):
            raise CheckpointError(f"{folder} lacks {name}, so it is incomplete or was saved from another model")


def _set(model: nn.Module, name: str, place: torch.Tensor, tensor: torch.Tensor) -> None:
    parent, _, last = name.rpartition(".")
    module = model.get_submodule(parent)
    tensor = tensor.to(place.dtype)
    setattr(module, last, nn.Parameter(tensor, place.requires_grad) if last in module._parameters else tensor)


class _Weightless(TorchFunctionMode):
    """Sends every new tensor to the meta device, and lets those that are there already be moved and cast without data."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _device_constructors():
            # transformers makes an empty tensor to find the device in force, and loads nothing onto meta.
            # By its name: another function may stand at torch.tensor, which calls this one.
            if not (func.__name__ == "tensor" and isinstance(args[0], list) and not args[0]):
                kwargs["device"] = "meta"
        elif func in (torch.Tensor.to, torch.Tensor.cpu) and args[0].device.type == "meta":
            return args[0].to(device="meta", dtype=_dtype_of(args, kwargs)) if _dtype_of(args, kwargs) else args[0]
        elif func is torch.Tensor.copy_ and args[1].device.type == "meta":
            return args[0]
        return func(*args, **kwargs)


def _dtype_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.dtype | None:
    found = [value for value in (*args[1:], *kwargs.values()) if isinstance(value, torch.dtype)]
    return found[0] if found else None


@contextmanager
def low_memory_init() -> Iterator[None]:
    """Inside, models are made without weights: only the shapes are there, until `load_low_bit` fills them."""
    with _Weightless():
        yield
