"""How a tokenizer cuts a text into words, in the few words that the C++ face understands.

    style          "gpt2" or "llama3": the regular expression, see csrc/face/splitter.h
    most_digits    of a word of digits in the style of llama3
    digits_apart   every digit is cut off first (SmolLM)
    letters, numbers, not_composed    characters as ranges, by the Unicode of this Python

The C++ face has neither regular expressions nor tables of Unicode, and needs them for nothing else.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from lowbit.errors import LowbitError

_ENDINGS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = _ENDINGS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST
QWEN = _ENDINGS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST
_MOST_DIGITS = {LLAMA3: 3, QWEN: 1}
_PLAIN_FLAGS = ("single_word", "lstrip", "rstrip")
_LAST_ASSIGNED = 0x3FFFF  # no letter or number lies beyond the third plane


def splitting(tokenizer: dict[str, Any]) -> dict[str, Any]:
    """The splitting of a tokenizer.json, or a refusal that says what in it is different."""
    model, normalizer = tokenizer["model"], tokenizer.get("normalizer")
    if model.get("type") != "BPE" or model.get("byte_fallback") or model.get("dropout"):
        raise _refusal(f"its model is {model.get('type')}, and not byte pairs of bytes")
    if normalizer is not None and normalizer.get("type") != "NFC":
        raise _refusal(f"it changes text before cutting it ({normalizer.get('type')})")
    for token in tokenizer["added_tokens"]:
        flags = [flag for flag in _PLAIN_FLAGS if token.get(flag)]
        if flags:
            raise _refusal(f"its token {token['content']} is looked for in a special way ({', '.join(flags)})")
    if (tokenizer.get("decoder") or {}).get("type") != "ByteLevel":
        raise _refusal("its tokens are not written as bytes")
    composed = normalizer is not None
    return _style(tokenizer.get("pre_tokenizer") or {}) | {
        "letters": _ranges(_is_letter),
        "numbers": _ranges(_is_number),
        "not_composed": _ranges(_is_not_composed) if composed else [],
    }


def _style(cutter: dict[str, Any]) -> dict[str, Any]:
    steps = cutter["pretokenizers"] if cutter.get("type") == "Sequence" else [cutter]
    kinds = [step.get("type") for step in steps]
    if kinds[-1:] != ["ByteLevel"] or any(step.get("add_prefix_space") for step in steps):
        raise _refusal(f"it cuts text by {', '.join(map(str, kinds))}")
    by_itself = steps[-1].get("use_regex", True)
    if kinds in (["ByteLevel"], ["Digits", "ByteLevel"]) and by_itself:
        apart = len(steps) > 1 and bool(steps[0].get("individual_digits"))
        if len(steps) == 1 or apart:
            return {"style": "gpt2", "most_digits": 0, "digits_apart": apart}
    if kinds == ["Split", "ByteLevel"] and not by_itself and steps[0].get("behavior") == "Isolated":
        expression = (steps[0].get("pattern") or {}).get("Regex")
        if expression in _MOST_DIGITS and not steps[0].get("invert"):
            return {"style": "llama3", "most_digits": _MOST_DIGITS[expression], "digits_apart": False}
    raise _refusal(f"it cuts text by {', '.join(map(str, kinds))} in a way of its own")


def _refusal(reason: str) -> LowbitError:
    return LowbitError(
        f"the C++ face cannot read this model's tokenizer: {reason}; make the tokens in Python and give the numbers"
    )


@lru_cache(maxsize=8)
def _ranges(belongs: Callable[[str], bool]) -> list[list[int]]:
    """The characters of a kind as [first, last]."""
    ranges: list[list[int]] = []
    for code in range(_LAST_ASSIGNED + 1):
        if not belongs(chr(code)):
            continue
        if ranges and ranges[-1][1] == code - 1:
            ranges[-1][1] = code
        else:
            ranges.append([code, code])
    return ranges


def _is_letter(character: str) -> bool:
    return unicodedata.category(character)[0] == "L"


def _is_number(character: str) -> bool:
    return unicodedata.category(character)[0] == "N"


def _is_not_composed(character: str) -> bool:
    """Whether composing may change the character, or what stands before it."""
    return (
        not unicodedata.is_normalized("NFC", character)
        or unicodedata.combining(character) != 0
        or 0x1161 <= ord(character) <= 0x11C2  # vowels and endings that make one Korean syllable with what is before
    )
