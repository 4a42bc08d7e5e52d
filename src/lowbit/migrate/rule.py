"""The nouns of `lowbit migrate`: a rule for an old name, a call as rules see it, what was decided about it, and what is told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lowbit.compat.shims.shim import Keyword

# How models are made by a class.
LOADING = ("from_pretrained", "load_low_bit", "from_config")


@dataclass(frozen=True)
class Rule:
    """`ours` is the new name. `members` are the attributes of a class that mean the same there."""

    ours: str
    members: tuple[str, ...] = ()
    rename: Mapping[str, str] = field(default_factory=dict)
    # Keywords that change nothing, and keywords with which the call keeps its old name; each with its reason.
    drop: Mapping[str, str] = field(default_factory=dict)
    stay: Mapping[str, str] = field(default_factory=dict)
    # Keywords that the new name needs, as source: in any case, and where the call has not said its own.
    add: Mapping[str, str] = field(default_factory=dict)
    default: Mapping[str, str] = field(default_factory=dict)
    # The old name left its first argument as it was: the new one takes its place, where the script has no other use for it.
    copies: bool = False
    # The old name left the model evaluating: the new one is given `model.eval()`.
    evaluates: bool = False
    # Keywords that the table of shims translates.
    table: Mapping[str, Keyword] = field(default_factory=dict)
    # The keywords that are understood, where others leave the call as it is; None: all that are not named above go along.
    only: tuple[str, ...] | None = None
    # The keyword for a device without which the old name took the Intel GPU where there is one.
    device: str = ""
    # The words of a script that go with the models made by the old name alone, and with which it stays.
    words: tuple[str, ...] = ()

    @property
    def reads_calls(self) -> bool:
        """Whether what becomes of a call depends on its keywords."""
        keywords = self.rename or self.stay or self.table or self.add or self.default or self.only or self.words
        return bool(keywords or (self.drop and self.members == LOADING))


@dataclass(frozen=True)
class Called:
    """A call as the rules see it: keywords with their values as far as they can be read, how many arguments have none,
    whether its result takes the name of its first argument, and whether it has keywords that cannot be read, `**more`."""

    keywords: Mapping[str, Any]
    positional: int = 0
    rebinds: bool = False
    unread: bool = False
    first: Any = None  # the value of the first argument, as far as it can be read


@dataclass(frozen=True)
class Decision:
    """What becomes of a use of an old name: the rule, the attributes behind the name that it stands for, or why it stays."""

    rule: Rule | None
    rest: str = ""
    reason: str = ""


@dataclass(frozen=True)
class Guess:
    """A call of `generate` in which an old library looked ahead: the keywords that go, and those that stand for them."""

    name: str
    gone: tuple[str, ...]
    now: Mapping[str, int]
    remark: str = (
        "prompt_lookup_num_tokens= is the same, but refuses several prompts and beams, with which that guessed nothing"
    )


@dataclass(frozen=True)
class Note:
    """Something about a line of the script that its user should know."""

    line: int
    name: str
    reason: str


@dataclass(frozen=True)
class Migrated:
    """The new source, what was left as it was, and what was dropped."""

    source: str
    left: list[Note]
    dropped: list[Note]
