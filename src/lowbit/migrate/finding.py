"""The first walk: every use of an old name, what becomes of it, and where a comment about it can stand.

Names are followed through whatever the script calls its imports. Some things are known only at the end of the walk: what the
script asks of a model, anywhere, decides about the call that made the model.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from lowbit.migrate import rules
from lowbit.migrate.rule import Called, Decision, Guess
from lowbit.migrate.rules import XPU
from lowbit.migrate.saying_xpu import Said
from lowbit.migrate.trees import (
    ParentNodeProvider,
    PositionProvider,
    QualifiedNameProvider,
    QualifiedNameSource,
    cst,
    dotted,
    is_name,
    literal,
)

_GUESSING = ("generate", "lookup_generate")


@dataclass(frozen=True)
class Use:
    """A use of a name outside of imports, by its canonical name, and the call that it is the function of."""

    node: cst.CSTNode
    name: str
    call: cst.Call | None
    decision: Decision

    def is_of(self, name: str) -> bool:
        return self.name == name or self.name.startswith(name + ".")

    @property
    def imported(self) -> str:
        """What was imported by name, if this use goes by that: all its uses have one name in the script."""
        behind = self.decision.rest.count(".") + 1 if self.decision.rest else 0
        head = self.node
        for _ in range(behind):
            head = head.value if isinstance(head, cst.Attribute) else head
        return self.name.removesuffix(f".{self.decision.rest}") if isinstance(head, cst.Name) else ""


class Finder(cst.CSTVisitor):
    """Every use that matters, decided; where each stands, and the statement above which a comment about it can stand."""

    METADATA_DEPENDENCIES = (QualifiedNameProvider, ParentNodeProvider, PositionProvider)

    def __init__(self) -> None:
        super().__init__()
        self.uses: dict[cst.CSTNode, Use] = {}
        self.torch_names: dict[cst.CSTNode, str] = {}
        self.devices: set[cst.CSTNode] = set()
        self.imported: set[str] = set()
        # Objects that the script has a second name for.
        self.shared: set[str] = set()
        self.lines: dict[cst.CSTNode, int] = {}
        self.statements: dict[cst.CSTNode, cst.CSTNode] = {}
        # Calls of `generate` in other words of today, and the words that these calls account for.
        self.guesses: dict[cst.CSTNode, Guess] = {}
        self.accounted: set[cst.CSTNode] = set()
        # What IPEX added to torch.xpu, and what says xpu in other ways than a word of its own or a name of torch's.
        self.added: dict[cst.CSTNode, str] = {}
        self.says_xpu: dict[cst.CSTNode, Said] = {}
        # What older transformers had.
        self.older: dict[cst.CSTNode, str] = {}
        # The words of the script that belong to the models of an old library.
        self.said: set[str] = set()

    def visit_Import(self, node: cst.Import) -> bool:
        self._place(node)
        self.imported |= {dotted(alias.name) for alias in node.names if alias.asname is None}
        return False

    def visit_ImportFrom(self, node: cst.ImportFrom) -> bool:
        self._place(node)
        module = dotted(node.module) if node.module is not None and not node.relative else ""
        for alias in () if isinstance(node.names, cst.ImportStar) else node.names:
            if rules.is_of_older(f"{module}.{dotted(alias.name)}", None):
                self._mark(node, f"{module}.{dotted(alias.name)}")
        return False

    def visit_Assign(self, node: cst.Assign) -> None:
        if isinstance(node.value, cst.Name):
            self.shared.add(node.value.value)

    def visit_SimpleString(self, node: cst.SimpleString) -> None:
        value = node.evaluated_value
        if not isinstance(value, str) or isinstance(self._parent(node), cst.Expr):
            return
        self._say(node, value)
        if value == XPU or (value[:4] == f"{XPU}:" and value[4:].isdigit()):
            self.devices.add(node)

    def visit_FormattedString(self, node: cst.FormattedString) -> None:
        first = node.parts[0] if node.parts else None
        if isinstance(first, cst.FormattedStringText) and first.value.startswith(f"{XPU}:"):
            self._place(node)
            self.says_xpu[node] = Said(f'f"{XPU}:..."')

    def visit_Call(self, node: cst.Call) -> None:
        if not isinstance(node.func, cst.Attribute) or node.func.attr.value not in _GUESSING:
            return
        called = self._called(node)
        guess = rules.guess(node.func.attr.value, called) if called is not None else None
        if guess is not None:
            self._place(node)
            self.guesses[node] = guess
            self.accounted |= {argument.keyword for argument in node.args if argument.keyword} | {node.func.attr}

    def visit_Arg(self, node: cst.Arg) -> None:
        if node.keyword is not None and node.keyword.value in rules.OLDER_KEYWORDS and self._is_not_ours(node):
            self._mark(node, f"{node.keyword.value}=")

    def _is_not_ours(self, argument: cst.Arg) -> bool:
        """Whether an argument goes to something else than a name of an old library, whose rules know their keywords."""
        call = self._parent(argument)
        func = call.func if isinstance(call, cst.Call) else None
        found = self.get_metadata(QualifiedNameProvider, func, set()) if func is not None else set()
        names = [rules.canonical(one.name) for one in found if one.source is QualifiedNameSource.IMPORT]
        return not any(rules.is_old(name) or name.startswith("lowbit.") for name in names)

    def visit_Attribute(self, node: cst.Attribute) -> bool:
        self._say(node.attr, node.attr.value)
        if node.attr.value in rules.OLDER_ATTRIBUTES:
            self._mark(node, node.attr.value)
        parent = self._parent(node)
        moves = parent if node.attr.value == XPU and isinstance(parent, cst.Call) and parent.func is node else None
        if moves is not None or node.attr.value == f"is_{XPU}":
            self._place(node)
            self.says_xpu[node] = Said(f".{node.attr.value}" + ("()" if moves else ""), moves)
        return not self._look_at(node)

    def visit_Name(self, node: cst.Name) -> None:
        self._say(node, node.value)
        self._look_at(node)

    def _say(self, node: cst.CSTNode, word: str) -> None:
        if word in rules.WORDS and node not in self.accounted:
            self.said.add(word)

    def _look_at(self, node: cst.Attribute | cst.Name) -> bool:
        """Whether this is a use of a name that matters."""
        parent = self._parent(node)
        if (isinstance(parent, cst.Attribute) and parent.attr is node) or not is_name(node):
            return False
        found = self.get_metadata(QualifiedNameProvider, node, set())
        names = sorted({rules.canonical(one.name) for one in found if one.source is QualifiedNameSource.IMPORT})
        call = parent if isinstance(parent, cst.Call) and parent.func is node else None
        if len(names) > 1:
            return self._keep_all(node, [name for name in names if rules.is_old(name)], call)
        name = names[0] if names else ""
        if rules.is_old(name) or rules.rule_for(name) is not None:
            self._place(node)
            called = Called({}, rebinds=True) if self._is_only_named(node) else self._called(call)
            self.uses[node] = Use(node, name, call, rules.decide(name, called))
        elif any(name == added or name.startswith(f"{added}.") for added in rules.ADDED_NAMES):
            self._place(node)
            self.added[node] = name
        elif name.startswith(rules.TORCH_XPU) or name in rules.GRAD_SCALERS:
            self._place(node)
            self.torch_names[node] = name
        elif name == rules.PIPELINE and rules.is_of_older(name, self._called(call)):
            self._mark(node, name)
        else:
            return False
        return True

    def _keep_all(self, node: cst.CSTNode, names: list[str], call: cst.Call | None) -> bool:
        """A name that the script imports here or there, as it finds it: the old one stays."""
        for name in names:
            self._place(node)
            self.uses[node] = Use(node, name, call, Decision(None, reason=rules.SEVERAL))
        return bool(names)

    def _mark(self, node: cst.CSTNode, name: str) -> None:
        """Something of older transformers."""
        self._place(node)
        self.older[node] = name

    def _is_only_named(self, node: cst.CSTNode) -> bool:
        """Whether it says a type: nothing is made there."""
        parent = self._parent(node)
        if isinstance(parent, cst.Arg):
            call = self._parent(parent)
            return isinstance(call, cst.Call) and isinstance(call.func, cst.Name) and call.func.value == "isinstance"
        return isinstance(parent, cst.Annotation)

    def _called(self, call: cst.Call | None) -> Called | None:
        if call is None:
            return None
        keywords = {argument.keyword.value: literal(argument) for argument in call.args if argument.keyword}
        positional = [argument for argument in call.args if not argument.keyword and argument.star != "**"]
        parent = self._parent(call)
        target = parent.targets[0].target if isinstance(parent, cst.Assign) and len(parent.targets) == 1 else None
        first = positional[0].value if positional else None
        while isinstance(first, cst.Call) and isinstance(first.func, cst.Attribute):  # model.eval() is the model
            first = first.func.value
        rebinds = isinstance(target, cst.Name) and isinstance(first, cst.Name) and target.value == first.value
        alone = isinstance(first, cst.Name) and first.value not in self.shared
        unread = any(argument.star == "**" for argument in call.args)
        opening = literal(positional[0]) if positional else None
        return Called(keywords, len(positional), rebinds and alone, unread, opening)

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

    # --- what is known at the end ---

    def leave_Module(self, original_node: cst.Module) -> None:
        for words in (rules.GUESSES, rules.TIMES):
            self._settle_makers(words)
        for name in {use.imported for use in self.uses.values() if use.decision.reason} - {""}:
            self._keep([use for use in self.uses.values() if use.imported == name], f"another use of {name} stays")

    def _settle_makers(self, words: tuple[str, ...]) -> None:
        """What makes a model stays where the script asks for more of the model than it has here."""
        makers = [
            use for use in self.uses.values() if use.decision.rule is not None and use.decision.rule.words is words
        ]
        said = [word for word in words if word in self.said]
        kept = any(use.decision.reason for use in makers)
        if said:
            self._keep(makers, f"{said[0]} goes with its models alone: {rules.COMPAT}")
        elif kept and words is rules.GUESSES and self.guesses:
            self._keep(
                makers, f"the script guesses, with a model whose maker stays for all that is known: {rules.COMPAT}"
            )
        if words is rules.GUESSES and (said or kept or not makers):
            self.guesses = {}

    def _keep(self, uses: list[Use], reason: str) -> None:
        for use in uses:
            if not use.decision.reason:
                self.uses[use.node] = replace(use, decision=replace(use.decision, reason=reason))
