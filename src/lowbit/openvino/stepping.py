"""The decoder of an encoder-decoder as a stateful graph: one call takes some tokens and gives the logits after each.

    input_ids, encoder_hidden_states, [encoder_attention_mask], beam_idx  ->  logits

It is traced as a function from the past to the past, and both ends become variables of the graph afterwards:

    self attention    past -> ReadValue -> Gather(beam_idx)          past with the new tokens -> Assign
    cross attention   keys and values -> ReadValue(computed from the encoder at the first call) -> Assign

A variable that was reset takes what its ReadValue is given, so the keys and values of the encoder's output are computed once for
each text or sound and not for each token. The mask is made of lengths inside the graph: a decoder has one sentence in a row, with
no padding before it.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch import nn
from transformers.cache_utils import DynamicLayer

from lowbit.errors import LowbitError
from lowbit.models.past import name_of_past, past_of
from lowbit.openvino.graph import floats, ints
from lowbit.openvino.library import Node, ops, ov, states
from lowbit.openvino.tracing import Traced, trace

_PAST = 3


class PastLayer(DynamicLayer):  # type: ignore[misc]  # transformers is not typed
    """The past of a layer without a beginning of its own: a tensor of no axes, which a graph could not join to."""

    def __init__(self, keys: torch.Tensor | None = None, values: torch.Tensor | None = None) -> None:
        super().__init__()
        if keys is not None and values is not None:
            self._take(keys, values)

    def update(self, keys: torch.Tensor, values: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        if self.is_initialized:
            keys, values = torch.cat([self.keys, keys], dim=-2), torch.cat([self.values, values], dim=-2)
        return self._take(keys, values)

    def _take(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.keys, self.values, self.is_initialized = keys, values, True
        self.dtype, self.device = keys.dtype, keys.device
        return keys, values


class _Step(nn.Module):
    """A call of the model with its past as tensors."""

    def __init__(self, model: Any, layers: int) -> None:
        super().__init__()
        self.model, self.layers = model, layers
        named = inspect.signature(model.forward).parameters
        self.takes_positions = "decoder_position_ids" in named
        self.past = name_of_past(model.forward)

    def forward(
        self,
        input_ids: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_attention_mask: Any = None,
        **past: Any,
    ) -> dict[str, torch.Tensor]:
        cache = transformers.EncoderDecoderCache(transformers.DynamicCache(), transformers.DynamicCache())
        cache.self_attention_cache.layers = [
            PastLayer(past[f"self.{layer}.key"], past[f"self.{layer}.value"]) for layer in range(self.layers)
        ]
        cache.cross_attention_cache.layers = [PastLayer() for _ in range(self.layers)]
        before, new = past["self.0.key"].shape[2], input_ids.shape[1]
        positions = torch.arange(new) + before
        hidden = torch.arange(before + new)[None] > positions[:, None]
        mask = hidden.float()[None, None] * torch.finfo(torch.float16).min
        options = {"decoder_position_ids": positions[None]} if self.takes_positions else {}
        found = self.model(
            attention_mask=encoder_attention_mask,
            encoder_outputs=(encoder_hidden_states,),
            decoder_input_ids=input_ids,
            decoder_attention_mask=mask,
            **{self.past: cache},
            use_cache=True,
            **options,
        )
        tensors = {"logits": found.logits}
        for kind, held in (("self", cache.self_attention_cache), ("cross", cache.cross_attention_cache)):
            for layer in range(self.layers):
                tensors[f"{kind}.{layer}.key"] = held.layers[layer].keys
                tensors[f"{kind}.{layer}.value"] = held.layers[layer].values
        return tensors


def trace_decoder(model: Any, hidden: torch.Tensor, mask: torch.Tensor | None) -> Traced:
    """The stateful graph of a model's decoder; `hidden` and `mask` are an example of what its encoder gives and is given."""
    shapes = _past_shapes(model, hidden)
    rows = hidden.shape[0]
    inputs = {"input_ids": torch.randint(3, 20, (rows, 2)), "encoder_hidden_states": hidden}
    if mask is not None:
        inputs["encoder_attention_mask"] = mask
    for layer, (heads, width) in enumerate(shapes):
        for part in ("key", "value"):
            inputs[f"self.{layer}.{part}"] = torch.randn(rows, heads, _PAST, width)
    outputs = ["logits"]
    outputs += [
        f"{kind}.{i}.{part}" for kind in ("self", "cross") for i in range(len(shapes)) for part in ("key", "value")
    ]
    # Inputs are named as they are asked for: those with a dot go through the keywords of a call.
    traced = trace(_Step(model, len(shapes)), inputs, outputs)
    graph = make_stateful(traced.model, shapes)
    return Traced(
        graph, without_prefix(traced.packed), tuple(without_prefix(dict.fromkeys(traced.dense))), traced.unread
    )


def without_prefix(names: Mapping[str, Any]) -> dict[str, Any]:
    return {name.removeprefix("model."): value for name, value in names.items()}


def _past_shapes(model: Any, hidden: torch.Tensor) -> list[tuple[int, int]]:
    """Heads and width of the keys of each decoder layer, as the model itself makes them."""
    with torch.no_grad():
        found = model(
            encoder_outputs=(hidden,),
            decoder_input_ids=torch.ones(hidden.shape[0], 1, dtype=torch.long),
            use_cache=True,
        )
    held = getattr(past_of(found), "self_attention_cache", None)
    if held is None:
        raise LowbitError(
            f"{type(model).__name__} keeps its past in no way that lowbit knows: use it through lowbit.optimize_model"
        )
    return [(int(layer.keys.shape[1]), int(layer.keys.shape[3])) for layer in held.layers]


def make_stateful(model: Any, shapes: list[tuple[int, int]], side: str = "decoder.") -> Any:
    """The past as variables: parameters and results of the traced graph become reads and assignments."""
    parameters = {port.get_any_name(): port.get_node() for port in model.inputs}
    results = {port.get_any_name(): port.get_node() for port in model.outputs}
    beams = ops.parameter([-1], ov.Type.i32, name="beam_idx")
    beams.output(0).get_tensor().set_names({"beam_idx"})
    rows = ops.gather(ops.shape_of(parameters["input_ids"], "i64"), ints(0), ints(0))
    sinks: list[Node] = []
    for layer, (heads, width) in enumerate(shapes):
        for part in ("key", "value"):
            name = f"self.{layer}.{part}"
            empty = ops.broadcast(floats(0.0), ops.concat([rows, ints(heads, 0, width)], 0))
            shape = ov.PartialShape([-1, heads, -1, width])
            read = states.read_value(empty, _variable(layer, side, part), ov.Type.f32, shape)
            past = ops.gather(read, beams, ints(0))
            past = ops.reshape(past, ints(0, heads, -1, width), True)
            for use in parameters[name].output(0).get_target_inputs():
                use.replace_source_output(past.output(0))
            sinks.append(states.assign(_node(results[name].input_value(0)), _variable(layer, side, part)))
            if f"cross.{layer}.{part}" in results:
                sinks.append(_keep(results[f"cross.{layer}.{part}"], _variable(layer, "encoder.", part), heads, width))
    kept = [parameter for name, parameter in parameters.items() if not name.startswith("self.")]
    return ov.Model([results["logits"]], sinks, [*kept, beams], "decoder")


def _keep(result: Node, variable: str, heads: int, width: int) -> Node:
    """Let all that reads a value read a variable that has it from the first call on."""
    made = result.input_value(0)
    uses = [use for use in made.get_target_inputs() if use.get_node() != result]
    read = states.read_value(_node(made), variable, ov.Type.f32, ov.PartialShape([-1, heads, -1, width]))
    for use in uses:
        use.replace_source_output(read.output(0))
    return states.assign(read, variable)


def _node(output: Node) -> Node:
    """A node with this output alone, as the operations of variables want it."""
    node = output.get_node()
    return node if node.get_output_size() == 1 else ops.convert(output, "f32")


def _variable(layer: int, side: str, part: str) -> str:
    return f"past_key_values.{layer}.{side}{part}present.{layer}.{side}{part}"
