"""What is said about a load through transformers: its errors as one sentence, and weights that found no place.

transformers takes a checkpoint for what the config says and goes on: it drops tensors that the model has no place for,
gives random numbers to weights that no file holds, and runs weights of a method that it does not know as if they were
dense. Each of the three makes a model that answers nonsense, so here the first two are looked up in its account of the
load, and the third before the load.
"""

from __future__ import annotations

import contextlib
import pickle
import re
import warnings
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from lowbit.checkpoint.folder import quantization_fields
from lowbit.contents import CONFIG
from lowbit.errors import CheckpointError, LowbitError, one_line

# What transformers raises about a config, a tokenizer or a pickle that is damaged: whatever its code fell over.
_STUMBLES = (
    AttributeError, KeyError, IndexError, TypeError, ValueError, ZeroDivisionError, AssertionError, OSError, EOFError,
    pickle.UnpicklingError, SafetensorError, StrictDataclassError,
)  # fmt: skip
_SIGNS_OF_DAMAGE = ("PytorchStreamReader", "zip archive", "invalid header")
# The number of a layer in a name: model.layers.[5].mlp
_LAYER = re.compile(r"(.*?\.|^)(\d+)\.")
_NAMED = 3
_CONFIG_KEYWORDS = ("config", "num_hidden_layers", "n_layer", "num_layers")


def check_method(folder: Path) -> None:
    """Refuse a folder whose weights are quantised by a method that neither lowbit nor transformers reads."""
    fields = quantization_fields(folder) if (folder / CONFIG).exists() else None
    method = (fields or {}).get("quant_method")
    if method is not None and str(method) not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        raise CheckpointError(
            f"{folder} is quantised with {method!r}, which cannot be read here: "
            f"known are {', '.join(sorted(AUTO_QUANTIZATION_CONFIG_MAPPING))}"
        )


@contextlib.contextmanager
def one_sentence(source: str, is_local: bool = True) -> Iterator[None]:
    """transformers' errors about a model as one sentence; those about a model of the hub are its own affair."""
    try:
        yield
    except LowbitError:
        raise
    except RuntimeError as error:
        if isinstance(error, RecursionError):
            raise CheckpointError(f"{source} cannot be loaded: a file of it is nested too deeply") from None
        if any(sign in str(error) for sign in _SIGNS_OF_DAMAGE):
            raise CheckpointError(f"{source}: its weights cannot be read, the file is damaged; get it again") from error
        if "mismatch" not in str(error):
            raise
        raise CheckpointError(
            f"{source}: weights have other shapes than config.json says (transformers lists them above); "
            "they are not of the same model"
        ) from None
    except _STUMBLES as error:
        if not is_local or (isinstance(error, OSError) and error.errno is not None):
            raise
        reason = one_line(str(error)) or type(error).__name__
        if isinstance(error, KeyError):
            reason = f"its files name {error}, which transformers does not know"
        raise CheckpointError(f"{source} cannot be loaded: {reason}") from error


def check_account(source: str, model: Any, account: Mapping[str, Collection[Any]], keywords: Collection[str]) -> None:
    """Refuse or warn about tensors that the model has no place for, and about weights that the checkpoint lacks."""
    left, lacking = (sorted(map(str, account.get(name, ()))) for name in ("unexpected_keys", "missing_keys"))
    if not set(_CONFIG_KEYWORDS) & set(keywords):
        refuse_other_layers(source, model, left)
    wrong = [name for name in lacking if _LAYER.search(name) and _is_in_base(model, name)]
    if wrong or (lacking and model.can_generate()):
        raise CheckpointError(
            f"{source}: the checkpoint lacks {len(lacking)} weights ({_some(wrong or lacking)}); "
            "it is incomplete, or of another model than config.json says"
        )
    if left:
        warnings.warn(f"{source}: {len(left)} tensors have no place in the model: {_some(left)}", stacklevel=4)
    if lacking:
        warnings.warn(
            f"{source}: {len(lacking)} weights are not in the checkpoint and start from random numbers: {_some(lacking)}",
            stacklevel=4,
        )


def refuse_other_layers(source: str, model: Any, names: Collection[str]) -> None:
    """Refuse tensors of layers beyond those that the model has."""
    own = _layers_of(model, (*dict(model.named_parameters()), *dict(model.named_buffers())))
    stems, there = {stem for stem, _ in own.values()}, set(own.values())
    layers = [
        n for n, (stem, number) in _layers_of(model, names).items() if stem in stems and (stem, number) not in there
    ]
    if layers:
        raise CheckpointError(
            f"{source} holds {len(layers)} weights of layers that the model of its config.json does not have "
            f"({_some(layers)}): the weights and the configuration are not of the same model"
        )


def _layers_of(model: Any, names: Collection[str]) -> dict[str, tuple[str, str]]:
    """Which layer each name belongs to: what stands before its number, within the base model, and the number."""
    found = ((name, _LAYER.match(name.removeprefix(f"{model.base_model_prefix}."))) for name in names)
    return {name: (layer[1], layer[2]) for name, layer in found if layer}


def _is_in_base(model: Any, name: str) -> bool:
    return model.base_model is model or name.startswith(f"{model.base_model_prefix}.")


def _some(names: list[str]) -> str:
    return ", ".join(names[:_NAMED]) + (", ..." if len(names) > _NAMED else "")
