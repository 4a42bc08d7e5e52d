"""The table of old names: each face declares its rows beside its code, and this room gathers them.

    NAMES = (
        Name("ipex_llm.optimize_model", "lowbit.optimize_model", WORKS, "tests/unit/test_compat_ipex_llm.py::test_optimize_model"),
    )

`old` is the dotted name as its users write it, with a parameter in brackets where a row is about one:
`ipex_llm.optimize_model(lightweight_bmm=)`. `ours` is lowbit's own name for it, empty where there is none. docs/migration.md is
made from the rows, and a test holds them against the code: a name that works resolves, a name of ours exists, a test is there.
"""

from __future__ import annotations

from dataclasses import dataclass

# The old name does what it did, through lowbit.
WORKS = "works"
# Accepted, without effect: a warning says so once, with the reason.
IGNORED = "ignored"
# Raises where it is used, with a sentence that says what to use instead.
REFUSED = "refused"
STATUSES = (WORKS, IGNORED, REFUSED)


@dataclass(frozen=True)
class Name:
    """An old name, ours, its status, the test that shows it (`file::function`), and a remark for its user."""

    old: str
    ours: str
    status: str
    test: str
    remark: str = ""
