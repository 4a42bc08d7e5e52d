"""`model.trace_graph`: what that library had traced of a model, called by scripts that write their own loop of tokens.

    logits, past = model.trace_graph(input_ids, attention_mask, position_ids, past)

Nothing is traced here: the model answers itself. The keys and values that such a script begins with have that library's private
layout, four tensors for each layer, the first of width 0; they hold nothing and stand for no keys. What comes back is handed on in
the next call.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from lowbit.compat.names import WORKS, Name
from lowbit.errors import RecipeError
from lowbit.models.past import PAST_NAMES, name_of_past, past_of

# The tensors of a call without names, in that library's order; a tuple among them is the keys and values.
_IN_ORDER = ("input_ids", "attention_mask", "position_ids")


class TraceGraph:
    """The model, called as its traced self."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __deepcopy__(self, memo: dict[int, Any]) -> TraceGraph:
        return TraceGraph(copy.deepcopy(self.model, memo))

    def __reduce__(self) -> tuple[Any, ...]:
        return (TraceGraph, (self.model,))

    def __call__(self, *inputs: Any, **named: Any) -> tuple[torch.Tensor, Any]:
        tensors = [given for given in inputs if isinstance(given, torch.Tensor)]
        named = dict(zip(_IN_ORDER, tensors, strict=False)) | named
        given = [named.pop(name) for name in PAST_NAMES if name in named]
        given += [value for value in inputs if not isinstance(value, torch.Tensor)]
        past = {name_of_past(self.model.forward): _held(given[-1] if given else None)}
        out = self.model(**named, **past, use_cache=True, return_dict=True)
        return out.logits, past_of(out)


def _held(past: Any) -> Any:
    """Keys and values as today's model takes them; None for that library's empty ones."""
    if not isinstance(past, tuple | list):
        return past
    if all(layer[0].numel() == 0 for layer in past):
        return None
    raise RecipeError(
        "trace_graph takes the keys and values that it gave back, or empty ones; of others call model(input_ids, past_key_values=)"
    )


def answer_as_traced_(model: nn.Module, deployment_mode: bool) -> nn.Module:
    """Give a language model its `trace_graph`, where that library traced."""
    if deployment_mode and hasattr(model, "get_input_embeddings"):
        model.trace_graph = TraceGraph(model)  # type: ignore[assignment]
    return model


NAMES = (
    Name(
        "model.trace_graph",
        "",
        WORKS,
        "tests/unit/test_compat_ipex_llm.py::test_trace_graph",
        "of a model of ipex.llm.optimize; nothing is traced, the model answers",
    ),
)
