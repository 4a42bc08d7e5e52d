"""What says xpu in other ways than a word of its own or a name of torch's, and what it becomes where a device is given.

    f"xpu:{i}"      f"cuda:{i}", or "cpu"
    model.xpu()     model.cuda(), or model.to("cpu")
    x.is_xpu        x.is_cuda

Only what is sure. On the CPU a device that `xpu(...)` is told may be any number, and `is_xpu` has no other name: they stay. So does
everything for a device that has a number itself, which one of several may be meant.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lowbit.migrate.rules import XPU
from lowbit.migrate.trees import as_argument, cst

_CUDA, _CPU = "cuda", "cpu"
_TO = "to"


@dataclass(frozen=True)
class Said:
    """Something that says xpu: what a note calls it, and for a method that moves the call whose function it is."""

    name: str
    call: cst.Call | None = None


def exchanges(says: Mapping[cst.CSTNode, Said], device: str | None) -> dict[cst.CSTNode, cst.BaseExpression]:
    """What is sure, by its node: the text that takes the place of another, the name that an attribute gets."""
    found: dict[cst.CSTNode, cst.BaseExpression | None] = {}
    for node, said in says.items() if device in (_CUDA, _CPU) else ():
        if isinstance(node, cst.FormattedString):
            found[node] = _text(node, str(device))
        elif device == _CUDA:
            found[node] = cst.Name(_CUDA if said.call is not None else f"is_{_CUDA}")
        else:
            found[node] = cst.Name(_TO) if said.call is not None and _names_no_device(said.call) else None
    return {node: made for node, made in found.items() if made is not None}


def moved_to(call: cst.Call, made: cst.BaseExpression) -> cst.Call:
    """A call of `xpu` under its new name, told the device where that is `to`."""
    if not isinstance(made, cst.Name) or made.value != _TO:
        return call
    place = as_argument("device", repr(_CPU)).with_changes(keyword=None, equal=cst.MaybeSentinel.DEFAULT)
    return call.with_changes(args=[place, *call.args])


def _text(node: cst.FormattedString, device: str) -> cst.BaseExpression | None:
    """A device and its number, and nothing else."""
    if len(node.parts) != 2:
        return None
    first, number = node.parts
    if not isinstance(first, cst.FormattedStringText) or not isinstance(number, cst.FormattedStringExpression):
        return None
    if first.value != f"{XPU}:":
        return None
    if device == _CUDA:
        return node.with_changes(parts=[cst.FormattedStringText(f"{_CUDA}:"), number])
    # What is computed may do something besides.
    plain = isinstance(number.expression, cst.Name | cst.Attribute | cst.Integer | cst.Subscript)
    quote = node.start.lstrip("fFrR")
    return cst.SimpleString(f"{quote}{_CPU}{node.end}") if plain else None


def _names_no_device(call: cst.Call) -> bool:
    return all(argument.keyword is not None and argument.keyword.value != "device" for argument in call.args)
