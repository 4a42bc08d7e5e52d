"""Language models of which lowbit has no spec, as graphs of OpenVINO all the same: by following a call of transformers' own class.

    input_ids, attention_mask, position_ids, beam_idx  ->  logits          the past is inside, as in every exported decoder

The model has to fit into memory, its weights in float32; and its past has to be keys and values of every layer. Masks are made in
the graph: the causal one, padding, and the windows that the configuration names. Weights that lowbit made low-bit keep their codes.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn

from lowbit.errors import LowbitError
from lowbit.models.past import name_of_past, past_of
from lowbit.openvino.stepping import PastLayer, make_stateful
from lowbit.openvino.tracing import trace

_PAST, _NEW, _ROWS = 3, 2, 2
_FULL, _SLIDING = "full_attention", "sliding_attention"


def trace_causal(model: Any) -> Any:
    """The stateful graph of a language model of transformers."""
    shapes = _past_shapes(model)
    tokens = torch.randint(3, 20, (_ROWS, _NEW))
    inputs = {
        "input_ids": tokens,
        "attention_mask": torch.ones(_ROWS, _PAST + _NEW, dtype=torch.long),
        "position_ids": torch.arange(_PAST, _PAST + _NEW).expand(_ROWS, -1),
    }
    names = [f"self.{layer}.{part}" for layer in range(len(shapes)) for part in ("key", "value")]
    for name in names:
        heads, width = shapes[int(name.split(".")[1])]
        inputs[name] = torch.randn(_ROWS, heads, _PAST, width)
    traced = trace(_Call(model, len(shapes)), inputs, ["logits", *names])
    graph = make_stateful(traced.model, shapes, side="")
    for node in graph.get_ops():
        node.set_friendly_name(
            node.get_friendly_name().removeprefix("model.") if _is_product(node) else node.get_friendly_name()
        )
    return graph


def _is_product(node: Any) -> bool:
    return bool(node.get_type_name() == "MatMul")


class _Call(nn.Module):
    """A call of the model with its past as tensors."""

    def __init__(self, model: Any, layers: int) -> None:
        super().__init__()
        self.model, self.layers = model, layers
        self.past = name_of_past(model.forward)
        config = model.config.get_text_config()
        self.window = getattr(config, "sliding_window", None)
        self.kinds = set(getattr(config, "layer_types", None) or ())

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, position_ids: torch.Tensor, **past: Any
    ) -> dict[str, torch.Tensor]:
        cache = transformers.DynamicCache()
        cache.layers = [PastLayer(past[f"self.{i}.key"], past[f"self.{i}.value"]) for i in range(self.layers)]
        found = self.model(
            input_ids=input_ids,
            attention_mask=self._masks(attention_mask, input_ids.shape[1]),
            position_ids=position_ids,
            **{self.past: cache},
            use_cache=True,
        )
        tensors = {"logits": found.logits}
        for i, layer in enumerate(cache.layers):
            tensors |= {f"self.{i}.key": layer.keys, f"self.{i}.value": layer.values}
        return tensors

    def _masks(self, attention_mask: torch.Tensor, new: int) -> Any:
        """[rows, 1, new, all], 0 where a token is seen; by kind of layer where there are several."""
        whole = attention_mask.shape[1]
        keys, queries = torch.arange(whole)[None], (torch.arange(new) + (whole - new))[:, None]
        full, near = keys > queries, keys > queries
        if self.window is not None:
            near = near | (keys <= queries - self.window)
        made = {}
        for kind, hidden in ((_FULL, full), (_SLIDING, near)):
            hides = hidden[None, None] | (attention_mask == 0)[:, None, None]
            made[kind] = hides.float() * torch.finfo(torch.float16).min
        if len(self.kinds) > 1:
            return made
        return made[_SLIDING if self.window is not None and self.kinds != {_FULL} else _FULL]


def _past_shapes(model: Any) -> list[tuple[int, int]]:
    """Heads and width of the keys of each layer, as the model itself makes them."""
    with torch.no_grad():
        found = model(input_ids=torch.full((1, 2), 3, device=model.device), use_cache=True)
    layers = getattr(past_of(found), "layers", None) or []
    keys = [getattr(layer, "keys", None) for layer in layers]
    values = [getattr(layer, "values", None) for layer in layers]
    odd = [k for k, v in zip(keys, values, strict=True) if k is None or v is None or k.dim() != 4 or k.shape != v.shape]
    if not layers or odd:
        raise LowbitError(
            f"{type(model).__name__} keeps more of its past than keys and values of one width, which no graph here holds: use it "
            "through lowbit.AutoModelForCausalLM"
        )
    return [(int(key.shape[1]), int(key.shape[3])) for key in keys if key is not None]
