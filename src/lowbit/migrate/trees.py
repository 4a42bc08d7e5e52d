"""The one door to libcst, and what is read from its trees and built for them.

dotted(node)            the text of a name with dots
literal(argument)       the value of an argument, as far as it can be read
as_argument("a", "1")   the argument a=1
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from typing import Any, cast

import libcst as cst
from libcst.metadata import (
    MetadataWrapper,
    ParentNodeProvider,
    PositionProvider,
    QualifiedNameProvider,
    QualifiedNameSource,
)

from lowbit.migrate import rules

__all__ = [
    "MetadataWrapper",
    "ParentNodeProvider",
    "PositionProvider",
    "QualifiedNameProvider",
    "QualifiedNameSource",
    "cst",
]


def is_name(node: cst.BaseExpression) -> bool:
    """Whether there is nothing but dots in it: what a call gave has attributes of its own, `load("small").to`."""
    while isinstance(node, cst.Attribute):
        node = node.value
    return isinstance(node, cst.Name)


def after_opening(body: Sequence[Any]) -> int:
    """Behind the docstring and what Python wants first."""
    place = 0
    for index, statement in enumerate(body):
        first = statement.body[0] if isinstance(statement, cst.SimpleStatementLine) else None
        is_text = index == 0 and isinstance(first, cst.Expr) and isinstance(first.value, cst.SimpleString)
        module = first.module if isinstance(first, cst.ImportFrom) else None
        if is_text or (module is not None and dotted(module) == "__future__"):
            place = index + 1
    return place


def literal(given: cst.Arg | None) -> Any:
    try:
        return ast.literal_eval(cst.Module([]).code_for_node(given.value)) if given else rules.UNKNOWN
    except (ValueError, SyntaxError):
        return rules.UNKNOWN


def dotted(node: cst.CSTNode) -> str:
    return f"{dotted(node.value)}.{node.attr.value}" if isinstance(node, cst.Attribute) else cast(cst.Name, node).value


def named(name: str) -> cst.Attribute | cst.Name:
    return cast("cst.Attribute | cst.Name", cst.parse_expression(name))


def bound(alias: cst.ImportAlias) -> str:
    """What a plain import makes known: the module under a name of its own, or else all of its package."""
    name = rules.canonical(dotted(alias.name))
    return name if alias.asname is not None else name.partition(".")[0]


def renamed(ours: str, alias: cst.ImportAlias) -> cst.ImportAlias:
    """The new name under the name that the script has for it."""
    known = cast(cst.Name, alias.asname.name).value if alias.asname else dotted(alias.name)
    return cst.ImportAlias(cst.Name(ours), None if known == ours else cst.AsName(cst.Name(known)))


def listed(aliases: Sequence[cst.ImportAlias]) -> list[cst.ImportAlias]:
    """Aliases with commas between them."""
    comma = cst.Comma(whitespace_after=cst.SimpleWhitespace(" "))
    bare = [alias.with_changes(comma=cst.MaybeSentinel.DEFAULT) for alias in aliases]
    return [*(alias.with_changes(comma=comma) for alias in bare[:-1]), bare[-1]]


def as_argument(name: str, source: str) -> cst.Arg:
    equal = cst.AssignEqual(cst.SimpleWhitespace(""), cst.SimpleWhitespace(""))
    value = cst.parse_expression(source.replace("'", '"') if source.startswith("'") else source)
    return cst.Arg(value, keyword=cst.Name(name), equal=equal)


def evaluating(argument: cst.Arg) -> cst.Arg:
    """An argument that is a model, put to evaluating."""
    value = argument.value
    method = value.func if isinstance(value, cst.Call) else None
    if isinstance(method, cst.Attribute) and method.attr.value == "eval":
        return argument
    plain = isinstance(value, cst.Name | cst.Attribute | cst.Call | cst.Subscript)
    owner = value if plain else value.with_changes(lpar=[cst.LeftParen()], rpar=[cst.RightParen()])
    return argument.with_changes(value=cst.Call(cst.Attribute(owner, cst.Name("eval"))))
