"""The functions that the core exports: each is given wrong arguments by the native checks, and lets no exception through."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
CORE, CHECKS = ROOT / "src/lowbit/csrc", ROOT / "tests/cpu/native"
# What gives a constant or a number back: no arguments to get wrong, and nothing that could throw.
PLAIN = {
    "lowbit_version",
    "lowbit_isa",
    "lowbit_last_error",
    "lowbit_fold_length",
    "lowbit_bf16_tokens",
    "lowbit_tight_pays",
}
# Arithmetic on what is there: no memory is taken, no thread started.
QUIET = PLAIN | {
    "lowbit_set_isa",
    "lowbit_quota",
    "lowbit_check_map",
    "lowbit_release_map",
    "lowbit_prepared_bytes",
    "lowbit_tight_bytes",
    *(
        f"lowbit_engine_{verb}"
        for verb in ("destroy", "cache_type", "length", "shortest", "truncate", "save", "restore")
    ),
    *(f"lowbit_engine_{verb}" for verb in ("expect", "cancel", "resume", "set_check", "set_profile", "profile")),
    *(f"lowbit_folder_{verb}" for verb in ("close", "engine", "context", "vocabulary")),
}
CATCHING = ("catch (...)", "continue_slot(")  # the second has it for both that call it


def exported() -> set[str]:
    names = [re.findall(r"^LOWBIT_API .*?\b(lowbit_\w+)\(", file.read_text(), re.M) for file in CORE.glob("*.h")]
    return {name for found in names for name in found}


def bodies() -> dict[str, str]:
    """Each definition, up to the brace that ends it (and what a function's own `try` catches)."""
    one_line, several = r"[^\n]*\}$", r".*?^\}$"
    definition = re.compile(rf'^extern "C" [^;{{]*?\b(lowbit_\w+)\((?:{one_line}|{several})', re.M | re.S)
    found = {}
    for file in CORE.rglob("*.cpp"):
        found.update({match[1]: match[0] for match in definition.finditer(file.read_text())})
    return found


def test_every_exported_function_is_given_wrong_arguments() -> None:
    checks = "".join(file.read_text() for file in CHECKS.glob("*_check.cpp"))
    missing = {name for name in exported() - PLAIN if not re.search(rf"\b{name}\b", checks)}
    assert len(exported()) > 50 and not missing


def test_no_exception_crosses_the_border() -> None:
    found = bodies()
    assert set(found) == exported()
    loose = {name for name, body in found.items() if not any(word in body for word in CATCHING)}
    assert loose == QUIET
