"""Where the weights of an `openvino.Model` are, whoever made it, and how one is put in the place of another.

A `Site` is one constant and all its uses:

    linear      MatMul(x, W [out, in] transposed, or [in, out])            one group of scales runs along `in`
    embedding   Gather(W [entries, width], ids)
    conv        Convolution, GroupConvolution and their backward forms     rows are outputs, all the rest is `in`

A head tied to its embedding is one site with two uses. Constants of f16 and bf16 are followed through the Convert behind them. A
weight that is low-bit already is a constant of small numbers behind Convert, Subtract, Multiply and Reshape; `low_bit_weights`
counts those, so that nobody rounds a second time what was rounded well.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lowbit.openvino.library import ops, ov

Array = NDArray[Any]
SiteRole = Literal["linear", "embedding", "conv"]
_CONVS = {
    "Convolution": 1,
    "GroupConvolution": 2,
    "ConvolutionBackpropData": 1,
    "GroupConvolutionBackpropData": 2,
}
_MATRIX = 2
_FLOATS = ("f32", "f16", "bf16", "f64")
_SMALL = ("u1", "u2", "i2", "u3", "u4", "i4", "u6", "u8", "i8", "nf4", "f4e2m1", "f8e4m3", "f8e5m2")
# What stands between the constant of a low-bit weight and its use.
_BETWEEN = ("Convert", "Subtract", "Multiply", "Reshape", "Gather", "Transpose")


@dataclass(frozen=True)
class Use:
    """One input of one operation that reads a weight."""

    role: SiteRole
    input: Any
    place: int  # of the operation among all of the model
    transposed: bool = False  # MatMul has it as [in, out]

    @property
    def operation(self) -> Any:
        return self.input.get_node()


@dataclass(frozen=True)
class Site:
    """One weight of a model: `end` is the output that is used, the constant's own or that of the Convert behind it."""

    name: str
    constant: Any
    end: Any
    uses: tuple[Use, ...]

    @property
    def role(self) -> SiteRole:
        """An embedding where it is one at all: a tied head has its weight by rows too."""
        roles = [use.role for use in self.uses]
        return "embedding" if "embedding" in roles else roles[0]

    @property
    def turned(self) -> bool:
        """Whether the constant is [.., in, out]."""
        return self.uses[0].transposed

    @property
    def stored(self) -> tuple[int, ...]:
        return tuple(self.constant.output(0).shape)

    @property
    def shape(self) -> tuple[int, ...]:
        """[.., out, in], as weights are packed."""
        if self.role == "conv":
            groups = _CONVS[self.uses[0].operation.get_type_name()]
            rows = int(np.prod(self.stored[:groups]))
            return (rows, int(np.prod(self.stored[groups:])))
        return (*self.stored[:-2], self.stored[-1], self.stored[-2]) if self.turned else self.stored

    @property
    def count(self) -> int:
        return int(np.prod(self.stored))

    def read(self) -> Array:
        """The weight as [.., out, in] in float32, in an array that may be written: torch warns of others."""
        values = np.asarray(self.constant.get_data(dtype=np.float32))
        if not values.flags.writeable:
            values = values.copy()
        if self.role == "conv":
            return values.reshape(self.shape)
        return np.ascontiguousarray(np.swapaxes(values, -1, -2)) if self.turned else values

    def replace_(self, weight: Any) -> None:
        """Let all uses read another weight, an output [.., out, in] of type f32."""
        for use in self.uses:
            given = weight
            if use.role == "conv":
                given = ops.reshape(given, np.array(self.stored, np.int64), False).output(0)
            kind = use.input.get_element_type()
            if kind != given.get_element_type():
                given = ops.convert(given, kind.to_string()).output(0)
            if use.transposed:
                _turn_(use.operation)
            use.input.replace_source_output(given)


def find_sites(model: Any) -> Iterator[Site]:
    """The weights of a model, in its order; vectors and tables of numbers are none."""
    order = model.get_ordered_ops()
    places = {node.get_friendly_name(): place for place, node in enumerate(order)}
    for node in order:
        if node.get_type_name() != "Constant" or node.get_element_type().to_string() not in _FLOATS:
            continue
        if len(node.output(0).shape) < _MATRIX:
            continue
        for end in _ends(node):
            uses = tuple(use for use in (_use(given, places) for given in end.get_target_inputs()) if use is not None)
            others = len(end.get_target_inputs()) - len(uses)
            if uses and not others and len({use.transposed for use in uses}) == 1:
                yield Site(_name(node, uses[0]), node, end, uses)


def low_bit_weights(model: Any) -> list[str]:
    """The names of the weights that are stored in small numbers."""
    found = []
    for node in model.get_ordered_ops():
        if node.get_type_name() != "Constant" or node.get_element_type().to_string() not in _SMALL:
            continue
        shape = node.output(0).shape
        if len(shape) >= _MATRIX and int(np.prod(shape)) > 1 and _leads_to_use(node):
            found.append(node.get_friendly_name())
    return found


def _leads_to_use(node: Any) -> bool:
    """Whether a constant goes through nothing but what makes a weight of it. Zeros and scales end at Subtract's and Multiply's
    second input."""
    for given in node.output(0).get_target_inputs():
        after, kind = given.get_node(), given.get_node().get_type_name()
        if _use(given, {}) is not None:
            return True
        if kind in _BETWEEN and (given.get_index() == 0 or _is_table(given)) and _leads_to_use(after):
            return True
    return False


def _is_table(given: Any) -> bool:
    """Whether an input says which numbers of a short table are meant."""
    gather = given.get_node()
    if gather.get_type_name() != "Gather" or given.get_index() != 1:
        return False
    rank = gather.input_value(0).get_partial_shape().rank
    return bool(rank.is_static and rank.get_length() == 1)


def _ends(node: Any) -> list[Any]:
    """The outputs of a constant that are used as a weight: its own, and those of Converts behind it."""
    own = node.output(0)
    behind = [given.get_node() for given in own.get_target_inputs()]
    converts = [after.output(0) for after in behind if after.get_type_name() == "Convert"]
    return converts if len(converts) == len(behind) else [own]


def _use(given: Any, places: Mapping[str, int]) -> Use | None:
    operation, index = given.get_node(), given.get_index()
    kind, place = operation.get_type_name(), places.get(operation.get_friendly_name(), 0)
    if kind == "MatMul" and index == 1:
        return Use("linear", given, place, not operation.get_attributes()["transpose_b"])
    if kind == "Gather" and index == 0 and len(given.get_shape()) == _MATRIX and _axis(operation) == 0:
        return Use("embedding", given, place)
    return Use("conv", given, place) if kind in _CONVS and index == 1 else None


def _axis(gather: Any) -> int | None:
    axis = gather.input_value(2).get_node()
    return int(axis.get_data().reshape(-1)[0]) if axis.get_type_name() == "Constant" else None


def _turn_(matmul: Any) -> None:
    """A MatMul whose second input was [in, out] takes [out, in]."""
    matmul.set_attribute("transpose_b", True)


def _name(constant: Any, use: Use) -> str:
    """The name of the parameter, or of the operation where conversion has folded something into it."""
    name = str(constant.get_friendly_name())
    if name.startswith("self."):
        return name.removeprefix("self.").removesuffix(".weight")
    anonymous = name.startswith(("Constant_", "Multiply_", "Transpose_", "Convert_", "Reshape_"))
    if not anonymous:
        return name.removesuffix(".weight")
    operation = str(use.operation.get_friendly_name())
    return operation.removeprefix("__module.").partition("/")[0]


assert ov.Type.f32.to_string() == "f32"
