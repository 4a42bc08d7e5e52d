"""Applies the rules to the source of a script, and leaves everything else in it as it is, comments and blank lines too.

Two walks. The first (finding.py) decides every use of a name that has a rule: translated, or kept for a reason. An object that was
imported by name is translated if all its uses are, for a script has one name for it. The second rewrites: imports, calls and
their keywords, and, where a device is given, the word "xpu".
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from lowbit.errors import LowbitError
from lowbit.migrate import rules
from lowbit.migrate.finding import Finder, Use
from lowbit.migrate.rule import Guess, Migrated, Note, Rule
from lowbit.migrate.rules import XPU
from lowbit.migrate.saying_xpu import exchanges, moved_to
from lowbit.migrate.trees import (
    MetadataWrapper,
    after_opening,
    as_argument,
    bound,
    cst,
    dotted,
    evaluating,
    listed,
    literal,
    named,
    renamed,
)

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
    finder = Finder()
    wrapper.visit(finder)
    rewriter = _Rewriter(finder, device)
    written = wrapper.module.visit(rewriter)
    left, dropped = (sorted(notes, key=lambda note: note.line) for notes in (rewriter.left, rewriter.dropped))
    return Migrated(written.code, left, dropped)


class _Rewriter(cst.CSTTransformer):
    """The second walk."""

    def __init__(self, finder: Finder, device: str | None) -> None:
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
                self._leave(node, name, rules.ASKS)
        for node, name in finder.added.items():
            self._leave(node, name, rules.ADDED)
        self.exchanged = exchanges(finder.says_xpu, device)
        for node, said in finder.says_xpu.items() if device else ():
            if node not in self.exchanged:
                self._leave(node, said.name, rules.SAYS_XPU)

        for node, name in finder.older.items():
            self._leave(node, name, rules.OF_OLD)

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
        there = {line.comment.value for line in first.leading_lines if line.comment}
        new = [_MARK + text for text in texts if _MARK + text not in there]
        comments = [cst.EmptyLine(comment=cst.Comment(text)) for text in new]
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
        source = (_INSTALL if self.left and "lowbit.compat" not in self.finder.imported else "") + missing
        if not source:
            return updated_node
        body, lines = list(updated_node.body), list(cst.parse_module(source).body)
        place = after_opening(body)
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
            old = [alias for alias in statement.names if rules.is_old(rules.canonical(dotted(alias.name)))]
            going = [alias for alias in old if not self._stays(bound(alias))]
            rest = [alias for alias in statement.names if alias not in going]
            return None if not going else [statement.with_changes(names=listed(rest))] if rest else []
        if not isinstance(statement, cst.ImportFrom) or statement.module is None or statement.relative:
            return None
        module = rules.canonical(dotted(statement.module))
        if not isinstance(statement.names, cst.ImportStar):
            return self._named_import(statement, module, statement.names)
        if rules.is_old(module):
            self._leave(statement, f"{module}.*", "which of its names are used cannot be seen: import them by name")
        return None

    def _named_import(self, statement: cst.ImportFrom, module: str, names: Sequence[cst.ImportAlias]) -> Imports | None:
        stay: list[cst.ImportAlias] = []
        moved: dict[str, list[cst.ImportAlias]] = {}
        for alias in names:
            name = f"{module}.{dotted(alias.name)}"
            rule = rules.RULES.get(name)
            if rule is not None and rule.ours != name and not self._stays(name):
                home, _, ours = rule.ours.rpartition(".")
                moved.setdefault(home, []).append(renamed(ours, alias))
            elif rule is not None or self._stays(name) or not rules.is_old(name):
                stay.append(alias)
            elif not any(use.is_of(name) for use in self.finder.uses.values()):
                stay.append(alias)
                self._leave(statement, name, rules.reason_without_rule(name))
        if len(stay) == len(names):
            return None
        lines: Imports = [statement.with_changes(names=listed(stay))] if stay else []
        return lines + [cst.ImportFrom(named(home), listed(aliases)) for home, aliases in moved.items()]

    def _stays(self, name: str) -> bool:
        """Whether an imported object, or something under it, keeps its old name somewhere."""
        return any(use.is_of(name) for use in self.kept)

    # --- expressions ---

    def leave_FormattedString(
        self, original_node: cst.FormattedString, updated_node: cst.FormattedString
    ) -> cst.BaseExpression:
        return self.exchanged.get(original_node, updated_node)

    def leave_Attribute(self, original_node: cst.Attribute, updated_node: cst.Attribute) -> cst.BaseExpression:
        use = self.finder.uses.get(original_node)
        if use is not None and use.decision.rule is not None and use.decision.rule.ours and not use.decision.reason:
            return self._renamed(use, use.decision.rule, original_node, updated_node)
        if original_node in self.exchanged:
            return updated_node.with_changes(attr=self.exchanged[original_node])
        name = self.finder.torch_names.get(original_node, "")
        if self.device in (None, "cpu") or not name.startswith(rules.TORCH_XPU):
            return updated_node
        return named(name.replace(XPU, str(self.device).partition(":")[0], 1))

    def _renamed(self, use: Use, rule: Rule, original: cst.Attribute, updated: cst.Attribute) -> cst.BaseExpression:
        """By the name that the script has for it, if it was imported by that, else in full."""
        head: cst.BaseExpression = original
        for _ in filter(None, use.decision.rest.split(".")):
            head = head.value if isinstance(head, cst.Attribute) else head
        if isinstance(head, cst.Name) or rule.ours == use.name.removesuffix(f".{use.decision.rest}"):
            return updated
        self.needs[rule.ours.rpartition(".")[0]] = None
        return named(".".join(part for part in (rule.ours, use.decision.rest) if part))

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
            return updated_node.with_changes(args=[as_argument("device", repr(self.device)), *updated_node.args])
        if original_node.func in self.exchanged:
            return moved_to(updated_node, self.exchanged[original_node.func])
        guess = self.finder.guesses.get(original_node)
        if guess is not None:
            return self._guess(original_node, updated_node, guess)
        return self._template(original_node, updated_node, given)

    def _guess(self, original: cst.Call, updated: cst.Call, guess: Guess) -> cst.Call:
        """A `generate` whose guesses have other names today."""
        self.dropped.append(Note(self.finder.lines[original], guess.name, guess.remark))
        kept = [one for one in updated.args if not one.keyword or one.keyword.value not in guess.gone]
        args = [*kept, *(as_argument(name, repr(value)) for name, value in guess.now.items())]
        args[-1] = args[-1].with_changes(comma=updated.args[-1].comma)
        function = cst.ensure_type(updated.func, cst.Attribute).with_changes(attr=cst.Name("generate"))
        return updated.with_changes(func=function, args=args)

    def _template(self, original: cst.Call, updated: cst.Call, given: dict[str, cst.Arg]) -> cst.Call:
        """A chat template gave the tokens; today it gives a dictionary unless told."""
        function = original.func
        if not isinstance(function, cst.Attribute) or function.attr.value != "apply_chat_template":
            return updated
        spread = any(argument.star for argument in updated.args)
        if spread or "return_dict" in given or literal(given.get("tokenize")) is False:
            return updated
        return updated.with_changes(args=[*updated.args, as_argument("return_dict", "False")])

    def _arguments(self, use: Use, rule: Rule, given: Sequence[cst.Arg]) -> Iterator[cst.Arg]:
        for argument in given:
            keyword, value = argument.keyword.value if argument.keyword else "", literal(argument)
            now = rules.today(rule, keyword, value)
            if not now and keyword:
                reason = rule.drop[keyword] if keyword in rule.drop else rule.table[keyword].reason
                self.dropped.append(Note(self.finder.lines[use.node], f"{use.name}({keyword}=)", reason))
            for name, new in (now or {}).items() if keyword else ():
                same = new is value or new == value
                named_now = argument.with_changes(keyword=cst.Name(name)) if same else as_argument(name, repr(new))
                yield evaluating(named_now) if rule.evaluates and name == "model" else named_now
            if not keyword:
                yield evaluating(argument) if rule.evaluates else argument
        made = {rule.rename.get(one.keyword.value, one.keyword.value) for one in given if one.keyword}
        if rule.device and use.decision.rest == "from_pretrained" and rule.device not in made:
            if self.device is None:
                self.dropped.append(Note(self.finder.lines[use.node], use.name, rules.NO_DEVICE))
            elif self.device != "cpu":
                yield as_argument(rule.device, repr(self.device))
        more = {**rule.add} | {name: source for name, source in rule.default.items() if name not in made}
        yield from (as_argument(name, source) for name, source in more.items())

    def leave_SimpleString(self, original_node: cst.SimpleString, updated_node: cst.SimpleString) -> cst.BaseExpression:
        if self.device is None or original_node not in self.finder.devices:
            return updated_node
        return updated_node.with_changes(value=f"{original_node.quote}{self.device}{original_node.quote}")
