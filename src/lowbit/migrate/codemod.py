"""Applies the rules to the source of a script, and leaves everything else in it as it is, comments and blank lines too.

Two walks. The first finds every use of a name that has a rule, through whatever names the script gave its imports, and decides
each: translated, or kept for a reason. An object that was imported by name is translated if all its uses are, for a script has
one name for it. The second walk rewrites: imports, calls and their keywords, and, where a device is given, the word "xpu".
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import libcst as cst
from libcst.metadata import (
    MetadataWrapper,
    ParentNodeProvider,
    PositionProvider,
    QualifiedNameProvider,
    QualifiedNameSource,
)

from lowbit.errors import LowbitError
from lowbit.migrate import rules
from lowbit.migrate.rules import XPU, Decision, Migrated, Note, Rule

_INSTALL = "import lowbit.compat\n\nlowbit.compat.install()  # answers the old names that are left\n\n"
_MARK = "# lowbit: "
Imports = list[cst.Import | cst.ImportFrom]


def migrate(source: str, device: str | None = None) -> Migrated:
    """The script in lowbit's names; `device` stands for "xpu" where it is given."""
    try:
        module = cst.parse_module(source)
    except cst.ParserSyntaxError as error:
        where = f"line {error.raw_line}, {error.message.splitlines()[0]}"
        raise LowbitError(f"this is no Python that runs today: {where}") from None
    wrapper = MetadataWrapper(module)
    finder = _Finder()
    wrapper.visit(finder)
    rewriter = _Rewriter(finder, device)
    written = wrapper.module.visit(rewriter)
    left, dropped = (sorted(notes, key=lambda note: note.line) for notes in (rewriter.left, rewriter.dropped))
    return Migrated(written.code, left, dropped)


@dataclass(frozen=True)
class _Use:
    """A use of a name outside of imports, by its canonical name, and the call that it is the function of."""

    node: cst.CSTNode
    name: str
    call: cst.Call | None
    decision: Decision

    def is_of(self, name: str) -> bool:
        return self.name == name or self.name.startswith(name + ".")


class _Finder(cst.CSTVisitor):
    """Every use that matters, decided; where each stands, and the statement above which a comment about it can stand."""

    METADATA_DEPENDENCIES = (QualifiedNameProvider, ParentNodeProvider, PositionProvider)

    def __init__(self) -> None:
        super().__init__()
        self.uses: dict[cst.CSTNode, _Use] = {}
        self.torch_names: dict[cst.CSTNode, str] = {}
        self.words: set[cst.CSTNode] = set()
        self.imported: set[str] = set()
        # Objects that the script has a second name for.
        self.shared: set[str] = set()
        self.lines: dict[cst.CSTNode, int] = {}
        self.statements: dict[cst.CSTNode, cst.CSTNode] = {}

    def visit_Import(self, node: cst.Import) -> bool:
        self._place(node)
        self.imported |= {_dotted(alias.name) for alias in node.names if alias.asname is None}
        return False

    def visit_ImportFrom(self, node: cst.ImportFrom) -> bool:
        self._place(node)
        return False

    def visit_Assign(self, node: cst.Assign) -> None:
        if isinstance(node.value, cst.Name):
            self.shared.add(node.value.value)

    def visit_SimpleString(self, node: cst.SimpleString) -> None:
        value = node.evaluated_value
        is_device = isinstance(value, str) and (value == XPU or (value[:4] == f"{XPU}:" and value[4:].isdigit()))
        if is_device and not isinstance(self._parent(node), cst.Expr):
            self.words.add(node)

    def visit_Attribute(self, node: cst.Attribute) -> bool:
        return not self._look_at(node)

    def visit_Name(self, node: cst.Name) -> None:
        self._look_at(node)

    def _look_at(self, node: cst.Attribute | cst.Name) -> bool:
        """Whether this is a use of a name that matters."""
        parent = self._parent(node)
        if (isinstance(parent, cst.Attribute) and parent.attr is node) or not _is_name(node):
            return False
        found = self.get_metadata(QualifiedNameProvider, node, set())
        names = {one.name for one in found if one.source is QualifiedNameSource.IMPORT}
        name = rules.canonical(names.pop()) if len(names) == 1 else ""
        call = parent if isinstance(parent, cst.Call) and parent.func is node else None
        if rules.is_old(name) or rules.rule_for(name) is not None:
            self._place(node)
            self.uses[node] = _Use(node, name, call, rules.decide(name, self._called(call)))
        elif name.startswith(rules.TORCH_XPU) or name in rules.GRAD_SCALERS:
            self._place(node)
            self.torch_names[node] = name
        else:
            return False
        return True

    def _called(self, call: cst.Call | None) -> rules.Called | None:
        if call is None:
            return None
        keywords = {argument.keyword.value: _literal(argument) for argument in call.args if argument.keyword}
        parent = self._parent(call)
        target = parent.targets[0].target if isinstance(parent, cst.Assign) and len(parent.targets) == 1 else None
        first = call.args[0].value if call.args else None
        while isinstance(first, cst.Call) and isinstance(first.func, cst.Attribute):  # model.eval() is the model
            first = first.func.value
        rebinds = isinstance(target, cst.Name) and isinstance(first, cst.Name) and target.value == first.value
        alone = isinstance(first, cst.Name) and first.value not in self.shared
        return rules.Called(keywords, len(call.args) - len(keywords), rebinds and alone)

    def _parent(self, node: cst.CSTNode) -> cst.CSTNode | None:
        found: cst.CSTNode | None = self.get_metadata(ParentNodeProvider, node, None)
        return found

    def _place(self, node: cst.CSTNode) -> None:
        self.lines[node] = self.get_metadata(PositionProvider, node).start.line
        above: cst.CSTNode | None = node
        while above is not None and not hasattr(above, "leading_lines"):
            above = self._parent(above)
        if above is not None:
            self.statements[node] = above


class _Rewriter(cst.CSTTransformer):
    """The second walk."""

    def __init__(self, finder: _Finder, device: str | None) -> None:
        super().__init__()
        self.finder, self.device = finder, device
        self.left: list[Note] = []
        self.dropped: list[Note] = []
        self.needs: dict[str, None] = {}
        # Comments to come above a statement, and comments of statements that went.
        self.marks: dict[cst.CSTNode, list[str]] = {}
        self.orphans: list[cst.EmptyLine] = []
        uses = list(finder.uses.values())
        self.kept = [use for use in uses if use.decision.reason]
        self.calls = {use.call: use for use in uses if use.call is not None and not use.decision.reason}
        for use in self.kept:
            self._leave(use.node, use.name, use.decision.reason)
        for node, name in finder.torch_names.items():
            if device == "cpu" and name.startswith(rules.TORCH_XPU) and name not in rules.DONE_ON_CPU:
                self._leave(node, name, "it asks about an Intel GPU, and LOWBIT_XPU=cpu answers it")

    def _leave(self, node: cst.CSTNode, name: str, reason: str) -> None:
        """Mark a name that stays, and list it."""
        self.left.append(Note(self.finder.lines[node], name, reason))
        texts = self.marks.setdefault(self.finder.statements[node], [])
        if f"{name} stays: {reason}" not in texts:
            texts.append(f"{name} stays: {reason}")

    # --- statements ---

    def on_leave(self, original_node: Any, updated_node: Any) -> Any:
        """Comments go above the statement that they are about, those of a statement that went above the next one."""
        updated: Any = super().on_leave(original_node, updated_node)
        texts = self.marks.get(original_node, ())
        first = updated.nodes[0] if isinstance(updated, cst.FlattenSentinel) else updated
        if not hasattr(first, "leading_lines") or not (texts or self.orphans):
            return updated
        comments = [cst.EmptyLine(comment=cst.Comment(_MARK + text)) for text in texts]
        orphans = [line for line in self.orphans if line.comment or not first.leading_lines]
        changed = first.with_changes(leading_lines=[*first.leading_lines, *orphans, *comments])
        self.orphans = []
        return cst.FlattenSentinel([changed, *updated.nodes[1:]]) if first is not updated else changed

    def leave_SimpleStatementLine(
        self, original_node: cst.SimpleStatementLine, updated_node: cst.SimpleStatementLine
    ) -> Any:
        """Imports may become several or none; calls that do nothing any more go."""
        statement = original_node.body[0]
        if len(original_node.body) > 1:
            return updated_node
        lines = [] if self._does_nothing(statement) else self._imports(statement)
        if lines is None:
            return updated_node
        if not lines:
            self.orphans += updated_node.leading_lines
            return cst.RemoveFromParent()
        made = [cst.SimpleStatementLine([line]) for line in lines]
        made[0] = made[0].with_changes(leading_lines=updated_node.leading_lines)
        made[-1] = made[-1].with_changes(trailing_whitespace=updated_node.trailing_whitespace)
        return cst.FlattenSentinel(made)

    def leave_IndentedBlock(
        self, original_node: cst.IndentedBlock, updated_node: cst.IndentedBlock
    ) -> cst.IndentedBlock:
        nothing = [cst.SimpleStatementLine([cst.Pass()])]
        return updated_node if updated_node.body else updated_node.with_changes(body=nothing)

    def leave_Module(self, original_node: cst.Module, updated_node: cst.Module) -> cst.Module:
        missing = "".join(f"import {name}\n" for name in self.needs if name not in self.finder.imported)
        source = (_INSTALL if self.left else "") + missing
        if not source:
            return updated_node
        body, lines = list(updated_node.body), list(cst.parse_module(source).body)
        place = _after_opening(body)
        if place:
            lines[0] = lines[0].with_changes(leading_lines=[cst.EmptyLine(indent=False)])
        return updated_node.with_changes(body=[*body[:place], *lines, *body[place:]])

    def _does_nothing(self, statement: cst.BaseSmallStatement) -> bool:
        call = statement.value if isinstance(statement, cst.Expr) else None
        if not isinstance(call, cst.Call):
            return False
        use = self.finder.uses.get(call.func)
        if use is not None and use.name in rules.IDLE_CALLS:
            return True
        return self.device == "cpu" and self.finder.torch_names.get(call.func) in rules.DONE_ON_CPU

    # --- imports ---

    def _imports(self, statement: cst.BaseSmallStatement) -> Imports | None:
        """What an import statement becomes; None for one that stays as it is, and for everything else."""
        if isinstance(statement, cst.Import):
            old = [alias for alias in statement.names if rules.is_old(rules.canonical(_dotted(alias.name)))]
            going = [alias for alias in old if not self._stays(_bound(alias))]
            rest = [alias for alias in statement.names if alias not in going]
            return None if not going else [statement.with_changes(names=_listed(rest))] if rest else []
        if not isinstance(statement, cst.ImportFrom) or statement.module is None or statement.relative:
            return None
        module = rules.canonical(_dotted(statement.module))
        if not isinstance(statement.names, cst.ImportStar):
            return self._named_import(statement, module, statement.names)
        if rules.is_old(module):
            self._leave(statement, f"{module}.*", "which of its names are used cannot be seen: import them by name")
        return None

    def _named_import(self, statement: cst.ImportFrom, module: str, names: Sequence[cst.ImportAlias]) -> Imports | None:
        stay: list[cst.ImportAlias] = []
        moved: dict[str, list[cst.ImportAlias]] = {}
        for alias in names:
            name = f"{module}.{_dotted(alias.name)}"
            rule = rules.RULES.get(name)
            if rule is not None and rule.ours != name and not self._stays(name):
                home, _, ours = rule.ours.rpartition(".")
                moved.setdefault(home, []).append(_renamed(ours, alias))
            elif rule is not None or self._stays(name) or not rules.is_old(name):
                stay.append(alias)
            elif not any(use.is_of(name) for use in self.finder.uses.values()):
                stay.append(alias)
                self._leave(statement, name, rules.reason_without_rule(name))
        if len(stay) == len(names):
            return None
        lines: Imports = [statement.with_changes(names=_listed(stay))] if stay else []
        return lines + [cst.ImportFrom(_name(home), _listed(aliases)) for home, aliases in moved.items()]

    def _stays(self, name: str) -> bool:
        """Whether an imported object, or something under it, keeps its old name somewhere."""
        return any(use.is_of(name) for use in self.kept)

    # --- expressions ---

    def leave_Attribute(self, original_node: cst.Attribute, updated_node: cst.Attribute) -> cst.BaseExpression:
        use = self.finder.uses.get(original_node)
        if use is not None and use.decision.rule is not None and use.decision.rule.ours and not use.decision.reason:
            return self._renamed(use, use.decision.rule, original_node, updated_node)
        name = self.finder.torch_names.get(original_node, "")
        if self.device in (None, "cpu") or not name.startswith(rules.TORCH_XPU):
            return updated_node
        return _name(name.replace(XPU, str(self.device).partition(":")[0], 1))

    def _renamed(self, use: _Use, rule: Rule, original: cst.Attribute, updated: cst.Attribute) -> cst.BaseExpression:
        """By the name that the script has for it, if it was imported by that, else in full."""
        head: cst.BaseExpression = original
        for _ in filter(None, use.decision.rest.split(".")):
            head = head.value if isinstance(head, cst.Attribute) else head
        if isinstance(head, cst.Name) or rule.ours == use.name.removesuffix(f".{use.decision.rest}"):
            return updated
        self.needs[rule.ours.rpartition(".")[0]] = None
        return _name(".".join(part for part in (rule.ours, use.decision.rest) if part))

    def leave_Call(self, original_node: cst.Call, updated_node: cst.Call) -> cst.Call:
        given = {argument.keyword.value: argument for argument in updated_node.args if argument.keyword}
        use = self.calls.get(original_node)
        if use is not None and use.decision.rule is not None:
            args = list(self._arguments(use, use.decision.rule, updated_node.args))
            if args and len(args) < len(updated_node.args):  # the last one ends as the last one did
                args[-1] = args[-1].with_changes(comma=updated_node.args[-1].comma)
            return updated_node.with_changes(args=args)
        if self.device is not None and self.finder.torch_names.get(original_node.func) in rules.GRAD_SCALERS:
            # Without a word about the device a scaler of gradients is CUDA's.
            if "device" in given or len(given) < len(updated_node.args):
                return updated_node
            return updated_node.with_changes(args=[_argument("device", repr(self.device)), *updated_node.args])
        function = original_node.func
        if not isinstance(function, cst.Attribute) or function.attr.value != "apply_chat_template":
            return updated_node
        # It gave the tokens; today it gives a dictionary unless told.
        spread = any(argument.star for argument in updated_node.args)
        if spread or "return_dict" in given or _literal(given.get("tokenize")) is False:
            return updated_node
        return updated_node.with_changes(args=[*updated_node.args, _argument("return_dict", "False")])

    def _arguments(self, use: _Use, rule: Rule, given: Sequence[cst.Arg]) -> Iterator[cst.Arg]:
        for argument in given:
            keyword, value = argument.keyword.value if argument.keyword else "", _literal(argument)
            now = rules.today(rule, keyword, value)
            if not now and keyword:
                reason = rule.drop[keyword] if keyword in rule.drop else rule.table[keyword].reason
                self.dropped.append(Note(self.finder.lines[use.node], f"{use.name}({keyword}=)", reason))
            for name, new in (now or {}).items() if keyword else ():
                same = new is value or new == value
                yield argument.with_changes(keyword=cst.Name(name)) if same else _argument(name, repr(new))
            if not keyword:
                yield argument
        made = {rule.rename.get(one.keyword.value, one.keyword.value) for one in given if one.keyword}
        more = {**rule.add} | {name: source for name, source in rule.default.items() if name not in made}
        yield from (_argument(name, source) for name, source in more.items())

    def leave_SimpleString(self, original_node: cst.SimpleString, updated_node: cst.SimpleString) -> cst.BaseExpression:
        if self.device is None or original_node not in self.finder.words:
            return updated_node
        return updated_node.with_changes(value=f"{original_node.quote}{self.device}{original_node.quote}")


def _is_name(node: cst.BaseExpression) -> bool:
    """Whether there is nothing but dots in it: what a call gave has attributes of its own, `load("small").to`."""
    while isinstance(node, cst.Attribute):
        node = node.value
    return isinstance(node, cst.Name)


def _after_opening(body: Sequence[Any]) -> int:
    """Behind the docstring and what Python wants first."""
    place = 0
    for index, statement in enumerate(body):
        first = statement.body[0] if isinstance(statement, cst.SimpleStatementLine) else None
        is_text = index == 0 and isinstance(first, cst.Expr) and isinstance(first.value, cst.SimpleString)
        module = first.module if isinstance(first, cst.ImportFrom) else None
        if is_text or (module is not None and _dotted(module) == "__future__"):
            place = index + 1
    return place


def _literal(argument: cst.Arg | None) -> Any:
    try:
        return ast.literal_eval(cst.Module([]).code_for_node(argument.value)) if argument else rules.UNKNOWN
    except (ValueError, SyntaxError):
        return rules.UNKNOWN


def _dotted(node: cst.CSTNode) -> str:
    return f"{_dotted(node.value)}.{node.attr.value}" if isinstance(node, cst.Attribute) else cast(cst.Name, node).value


def _name(dotted: str) -> cst.Attribute | cst.Name:
    return cast("cst.Attribute | cst.Name", cst.parse_expression(dotted))


def _bound(alias: cst.ImportAlias) -> str:
    """What a plain import makes known: the module under a name of its own, or else all of its package."""
    name = rules.canonical(_dotted(alias.name))
    return name if alias.asname is not None else name.partition(".")[0]


def _renamed(ours: str, alias: cst.ImportAlias) -> cst.ImportAlias:
    """The new name under the name that the script has for it."""
    known = cast(cst.Name, alias.asname.name).value if alias.asname else _dotted(alias.name)
    return cst.ImportAlias(cst.Name(ours), None if known == ours else cst.AsName(cst.Name(known)))


def _listed(aliases: Sequence[cst.ImportAlias]) -> list[cst.ImportAlias]:
    """Aliases with commas between them."""
    comma = cst.Comma(whitespace_after=cst.SimpleWhitespace(" "))
    bare = [alias.with_changes(comma=cst.MaybeSentinel.DEFAULT) for alias in aliases]
    return [*(alias.with_changes(comma=comma) for alias in bare[:-1]), bare[-1]]


def _argument(name: str, source: str) -> cst.Arg:
    equal = cst.AssignEqual(cst.SimpleWhitespace(""), cst.SimpleWhitespace(""))
    value = cst.parse_expression(source.replace("'", '"') if source.startswith("'") else source)
    return cst.Arg(value, keyword=cst.Name(name), equal=equal)
