"""What a model of transformers is called with while it is followed, and what it gives.

The sizes of an example do not stay in the graph: two rows and seven tokens stand for any. Whether they really do is checked by
`differs`, which asks the module and the graph for another size; a module that decides by sizes in Python would answer for those
of the example alone, and silently so.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from lowbit.errors import LowbitError
from lowbit.openvino.opening import EXACT, compile_model

_ROWS, _TOKENS, _SAMPLES = 2, 7, 16000
_PICTURE = 224
# What transformers calls a table with a row for each place in a text.
_POSITIONS = ("position_embeddings", "position_embedding", "wpe")
# What packed layers of the core may differ by: it rounds activations to 8 bits.
_DENSE, _PACKED = 1e-3, 0.2


def example_of(
    model: Any, rows: int = _ROWS, tokens: int = _TOKENS, positions: bool = False
) -> dict[str, torch.Tensor]:
    """Inputs of a model by its kind: tokens with their mask, pictures, or sound.

    Places of tokens are the model's own affair (RoBERTa begins with 2), unless it cannot be followed without them.
    """
    main = str(model.main_input_name)
    if main == "pixel_values":
        return {main: torch.rand(rows, *_picture(model.config))}
    if main == "input_features":
        bins = model.config.num_mel_bins
        return {main: torch.rand(rows, bins, 2 * getattr(model.config, "max_source_positions", 500))}
    if main == "input_values":
        return {main: torch.rand(rows, _SAMPLES + 160 * tokens)}
    if main != "input_ids":
        raise LowbitError(
            f"{type(model).__name__} is called with {main}: lowbit.openvino.trace(model, inputs) takes inputs of any kind"
        )
    named = inspect.signature(model.forward).parameters
    ids = torch.randint(3, max(model.config.get_text_config().vocab_size, 4), (rows, tokens))
    found = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "token_type_ids" in named and getattr(model.config, "type_vocab_size", 0) > 1:
        found["token_type_ids"] = torch.zeros_like(ids)
    if positions:
        found["position_ids"] = torch.arange(tokens)[None].repeat(rows, 1)
    return found


def takes_positions(model: Any) -> bool:
    """Whether a model of text can be told the places of its tokens."""
    return model.main_input_name == "input_ids" and "position_ids" in inspect.signature(model.forward).parameters


def table_of_positions(model: Any) -> tuple[int, int | None] | None:
    """How many tokens of a text a model has places for, and the token that takes none; None where it counts without a table.

    RoBERTa's table begins behind the padding, whose tokens all have its place.
    """
    if model.main_input_name != "input_ids":
        return None
    for path, part in model.named_modules():
        if isinstance(part, nn.Embedding) and path.rpartition(".")[2] in _POSITIONS:
            unused = part.padding_idx
            return part.num_embeddings - (0 if unused is None else unused + 1), unused
    return None


def fixed_for(model: Any) -> dict[str, Any]:
    """Arguments that a call has while it is followed: no past is kept, which would be an output that is no tensor."""
    return {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}


def outputs_of(model: nn.Module, inputs: Mapping[str, torch.Tensor], fixed: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of the tensors that a call gives."""
    with torch.no_grad():
        found = model(**inputs, **fixed)
    return tuple(name for name, value in found.items() if isinstance(value, torch.Tensor))


def differs(
    graph: Any, model: nn.Module, inputs: Mapping[str, torch.Tensor], fixed: Mapping[str, Any], packed: bool
) -> str:
    """What is wrong where the graph computes something else than the module, for inputs of other sizes; empty if nothing is."""
    with torch.no_grad():
        wanted = model(**inputs, **fixed)
    found = compile_model(graph, "CPU", EXACT)({name: value.numpy() for name, value in inputs.items()})
    for port in graph.outputs:
        name = port.get_any_name()
        expected, own = wanted[name].float().numpy(), found[name]
        if expected.shape != own.shape:
            return f"{name} is {list(own.shape)} in place of {list(expected.shape)}"
        away = float(np.linalg.norm(own - expected) / max(float(np.linalg.norm(expected)), 1e-12))
        if not away <= (_PACKED if packed else _DENSE):
            return f"{name} is {away:.2g} of its size away"
    return ""


def _picture(config: Any) -> tuple[int, int, int]:
    size = getattr(config, "image_size", None) or _PICTURE
    height, width = (size, size) if isinstance(size, int) else (size[0], size[1])
    return getattr(config, "num_channels", 3), height, width
