"""Any torch module as an `openvino.Model`, by following one call of it; packed weights arrive code for code.

    trace(module, inputs)          inputs: name of an argument -> an example of it; sizes of the example do not matter
        dense weights              become constants under the names of their parameters
        packed weights             enter the trace as inputs of the graph, so that nothing can be folded into them, and are put in
                                   the place of those inputs afterwards: a Constant of their codes and scales

While the module is followed, a stand-in of stride zero has the place of each packed weight: the trace needs its shape and not its
numbers, so that exporting takes the room of the low-bit model and not of the dense one. `Traced` names every weight: those that
came packed, those that came dense, and those that the call never read because no output that was asked for needs them.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lowbit.errors import LowbitError, RecipeError, one_line
from lowbit.layers import LowBitConv, LowBitEmbedding, LowBitExperts, LowBitLinear, PackedWeight
from lowbit.openvino.constants import hold
from lowbit.openvino.library import CONVERSION_FAILURES, follow, ov
from lowbit.openvino.weights import weight_output
from lowbit.swap import copy_model, replace_module

_HOLDERS = (LowBitLinear, LowBitEmbedding, LowBitConv)


@dataclass(frozen=True)
class Traced:
    """A graph, and the modules by name: formats of those that came packed, those that came dense, those that were not read."""

    model: Any
    packed: dict[str, str] = field(default_factory=dict)
    dense: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()
    notes: dict[str, str] = field(default_factory=dict)


class _Slot:
    """What a packed weight is while the module is followed: an input of the graph."""

    def __init__(self, held: PackedWeight) -> None:
        self.held = held
        self.value: torch.Tensor | None = None

    def example(self) -> torch.Tensor:
        return torch.zeros(1).expand(self.held.shape)


class _Standing(nn.Module):
    """A module in the place of a low-bit one, that reads its weight from a slot."""

    bias: nn.Parameter | None

    def __init__(self, module: nn.Module, slot: _Slot) -> None:
        super().__init__()
        self.slot = slot
        self.register_parameter("bias", module._parameters.get("bias"))

    @property
    def weight(self) -> torch.Tensor:
        if self.slot.value is None:  # the tracer looks at every attribute before it begins
            raise AttributeError("the weight of a stand-in is there while the module is followed")
        return self.slot.value


class _Linear(_Standing):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


class _Embedding(_Standing):
    def __init__(self, module: LowBitEmbedding, slot: _Slot) -> None:
        super().__init__(module, slot)
        self.scale = module.scale

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        values = nn.functional.embedding(ids, self.weight)
        return values if self.scale == 1.0 else values * self.scale


class _Conv(_Standing):
    def __init__(self, module: LowBitConv, slot: _Slot) -> None:
        super().__init__(module, slot)
        self.conv = module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        options = dict(self.conv.options)
        if self.conv.pads is not None:
            x = nn.functional.pad(x, self.conv.pads, mode=self.conv.padding_mode)
            options["padding"] = 0
        y: torch.Tensor = self.conv.functional(x, self.weight.view(self.conv.weight_shape), self.bias, **options)
        return y


_STANDING: dict[type[nn.Module], Any] = {LowBitLinear: _Linear, LowBitEmbedding: _Embedding, LowBitConv: _Conv}


class _Call(nn.Module):
    """A module as a function of tensors in a fixed order: first its inputs, then its packed weights."""

    def __init__(
        self, module: nn.Module, names: Sequence[str], outputs: Sequence[str], fixed: Mapping[str, Any]
    ) -> None:
        super().__init__()
        self.module, self.names, self.outputs, self.fixed = module, list(names), list(outputs), dict(fixed)
        self.slots: list[_Slot] = []
        self.refusal = ""  # the package wraps what is raised inside

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        given, weights = tensors[: len(self.names)], tensors[len(self.names) :]
        for slot, value in zip(self.slots, weights, strict=True):
            slot.value = value
        found = self.module(**dict(zip(self.names, given, strict=True)), **self.fixed)
        for slot in self.slots:
            slot.value = None
        if isinstance(found, torch.Tensor):
            return (found,)
        values = found if isinstance(found, Mapping) else dict(zip(self.outputs, found, strict=False))
        missing = [name for name in self.outputs if not isinstance(values.get(name), torch.Tensor)]
        if missing:
            self.refusal = f"the module gives no tensor {', '.join(missing)}; it gives {', '.join(map(str, values))}"
            raise ValueError(self.refusal)
        return tuple(values[name] for name in self.outputs)


def trace(
    module: nn.Module,
    inputs: Mapping[str, torch.Tensor],
    outputs: Sequence[str] = ("output",),
    fixed: Mapping[str, Any] | None = None,
) -> Traced:
    """A torch module, dense or low-bit, as a graph; `fixed` are arguments that are no inputs of it.

    `outputs` names what the module gives: keys where that is a mapping, places in order where it is a tuple.
    """
    copied = copy_model(module).float().eval()
    for part in copied.modules():  # the tracer looks at every attribute; that of a loss warns where a model has none
        if getattr(part, "loss_type", "") is None:
            vars(part)["loss_type"] = "ForCausalLM"
    slots, packed = _open_slots(copied)
    call = _Call(copied, list(inputs), outputs, fixed or {})
    call.slots = slots
    examples = (*inputs.values(), *(slot.example() for slot in slots))
    shapes = [ov.PartialShape([-1] * value.dim()) for value in inputs.values()]
    shapes += [ov.PartialShape(list(slot.held.shape)) for slot in slots]
    model = _convert(type(module).__name__, call, examples, shapes)
    notes, unread = _fill_(model, len(inputs), slots, list(packed))
    for port, name in zip(model.inputs, inputs, strict=True):
        port.get_node().set_friendly_name(name)
        port.get_tensor().set_names({name})
    for port, name in zip(model.outputs, outputs, strict=True):
        port.get_tensor().set_names({name})
    _plain_names_(model)
    model.validate_nodes_and_infer_types()
    for name in unread:
        del packed[name]
    dense = tuple(p for p, child in copied.named_modules() if getattr(child._parameters.get("weight"), "ndim", 0) > 1)
    return Traced(model, packed, tuple(name.removeprefix("module.") for name in dense), unread, notes)


def _open_slots(module: nn.Module) -> tuple[list[_Slot], dict[str, str]]:
    """Put stand-ins in the place of low-bit modules. Tied ones share a slot."""
    slots: dict[int, _Slot] = {}
    packed: dict[str, str] = {}
    for path, child in list(module.named_modules(remove_duplicate=False)):
        if isinstance(child, LowBitExperts):
            raise RecipeError(
                f"{path} holds packed experts, which cannot be followed by a trace: leave them dense, or export the decoder "
                "with `lowbit export openvino`, which writes experts"
            )
        if not isinstance(child, _HOLDERS):
            continue
        held = child.packed_weight
        if id(held) not in slots:
            packed[path] = held.format.name
        slot = slots.setdefault(id(held), _Slot(held))
        kind = next(stand for kind, stand in _STANDING.items() if isinstance(child, kind))
        replace_module(module, path, kind(child, slot))
    return list(slots.values()), packed


def _convert(name: str, call: _Call, examples: tuple[torch.Tensor, ...], shapes: list[Any]) -> Any:
    with _quiet(), torch.no_grad():
        try:
            return follow(call.eval(), examples, shapes)
        except (RuntimeError, TypeError, ValueError, *CONVERSION_FAILURES) as error:
            reason = call.refusal or f"{name} cannot be followed by OpenVINO: {one_line(str(error))}"
            raise LowbitError(reason) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Tracing warns of every comparison of sizes, in other people's code."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _fill_(model: Any, first: int, slots: list[_Slot], names: list[str]) -> tuple[dict[str, str], tuple[str, ...]]:
    """Put packed weights in the place of the inputs from `first` on. Gives notes on those that changed, and those without a use."""
    notes, unread = {}, []
    parameters = list(model.get_parameters())[first:]
    for parameter, slot, name in zip(parameters, slots, names, strict=True):
        held = hold(slot.held.packed())
        if held.shape != tuple(parameter.output(0).get_shape()):
            raise LowbitError(
                f"{name} is {list(held.shape)} and the graph reads {list(parameter.output(0).get_shape())}"
            )
        if not parameter.output(0).get_target_inputs():
            unread.append(name)
        else:
            if held.note:
                notes[name] = held.note
            new = weight_output(held, name)
            for use in parameter.output(0).get_target_inputs():
                use.replace_source_output(new)
        model.remove_parameter(parameter)
    return notes, tuple(unread)


def _plain_names_(model: Any) -> None:
    """Constants and products under the names of the module's own parts, without those of the trace around it."""
    for node in model.get_ops():
        name = str(node.get_friendly_name())
        kind = node.get_type_name()
        if name.startswith("self.module."):
            node.set_friendly_name(name.removeprefix("self.module."))
        elif kind in ("MatMul", "Convolution", "Gather") and name.startswith("__module.module."):
            node.set_friendly_name(name.removeprefix("__module.module."))
