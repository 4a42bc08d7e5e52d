"""From GGUF's vocabulary to a tokenizer.json for the tokenizers library.

GGUF stores the tokens, their types, and either merges (kind "gpt2": byte-level BPE) or scores (kind "llama":
SentencePiece BPE). How text is cut into words before merging is stored only as a name, `tokenizer.ggml.pre`; the
rows below say what each name stands for.

A SentencePiece merge has no rank of its own: the best pair is the one whose union has the highest score. So every
way to split a token into two tokens is a merge, ranked by the token's score.

The document is written as data rather than through the library's objects: the ids then are the file's, whatever the
order in which tokens would have been added.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from lowbit.errors import CheckpointError
from lowbit.interop.gguf_container import Container

Node = dict[str, Any]

WORD_START = "\u2581"  # SentencePiece's visible space


class TokenType(IntEnum):
    """What `tokenizer.ggml.token_type` says of a token."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """How text is cut before merging. `steps` are regular expressions to isolate, or keys of NAMED_STEPS."""

    names: str
    steps: tuple[str, ...]
    composed: bool = False  # Unicode composition (NFC) first
    whole_words: bool = False  # a word that is a token is that token, whatever the merges say
    begins: bool = False  # a beginning-of-sequence token is added unless the file says otherwise


# Steps of the tokenizers library by name; every other step is a regular expression. "words" is GPT-2's expression.
NAMED_STEPS: dict[str, Node] = {
    "digits": {"type": "Digits", "individual_digits": True},
    "numbers": {"type": "Digits", "individual_digits": False},
    "punctuation": {"type": "Punctuation", "behavior": "Contiguous"},
    "words": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
}

_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _ENDINGS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _TAIL
_QWEN2 = _ENDINGS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _TAIL
_QWEN35 = _ENDINGS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LOWER = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
_UPPER = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
_SLASH_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = f"{_LOWER}|{_UPPER}" + r"|\p{N}" + _SLASH_TAIL
_GPT4O = f"{_LOWER}{_ENDINGS}?|{_UPPER}{_ENDINGS}?" + r"|\p{N}{1,3}" + _SLASH_TAIL
_CJK_AND_KANA = "[一-龥぀-ゟ゠-ヿ]+"
_CJK_AND_HANGUL = "[一-龥ࠀ-一가-퟿]+"
_DEEPSEEK3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BLOOM = r" ?[^(\s|[.,!?…。，、।۔،])]+"

# What each name stands for is fixed by the original models' tokenizer.json; llama.cpp's llama-vocab.cpp lists them.
PRE_TOKENIZERS = (
    PreTokenizer("default falcon", ("punctuation", "words", "numbers", "[0-9][0-9][0-9]")),
    PreTokenizer(
        "gpt-2 phi-2 jina-es jina-de jina-v2-es jina-v2-de mellum exaone4 jais trillion granite-docling", ("words",)
    ),
    PreTokenizer("olmo mpt", ("words",), composed=True),
    PreTokenizer("smollm starcoder refact command-r codeshell exaone minerva-7b", ("digits", "words")),
    PreTokenizer("llama3 llama-v3 llama-bpe falcon3 pixtral midm-2.0 lfm2", (_LLAMA3,), whole_words=True, begins=True),
    PreTokenizer("dbrx smaug-bpe chatglm-bpe glm4", (_LLAMA3,)),
    PreTokenizer("qwen2 deepseek-r1-qwen megrez kormo", (_QWEN2,), composed=True),
    PreTokenizer("stablelm2 hunyuan", (_QWEN2,)),
    PreTokenizer("qwen35", (_QWEN35,), composed=True),
    PreTokenizer("tekken", (_TEKKEN,), whole_words=True, begins=True),
    PreTokenizer("gpt-4o llama4 kanana2", (_GPT4O,)),
    PreTokenizer("deepseek-v3 hunyuan-dense", (r"\p{N}{1,3}", _CJK_AND_KANA, _DEEPSEEK3)),
    PreTokenizer("deepseek-coder", ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK_AND_HANGUL, "digits")),
    PreTokenizer("bloom gpt3-finnish poro-chat", (_BLOOM,)),
    PreTokenizer("viking", (_BLOOM, "digits")),
)
_BY_NAME = {name: row for row in PRE_TOKENIZERS for name in row.names.split()}


def build_tokenizer(container: Container) -> str:
    """tokenizer.json as text."""
    stored = container.metadata.get("tokenizer.huggingface.json")
    if isinstance(stored, str) and stored:
        return stored
    kind = container.require("tokenizer.ggml.model")
    if kind not in _KINDS:
        raise CheckpointError(
            f"{container.path} has a tokenizer of the kind '{kind}'; the kinds {', '.join(_KINDS)} can be read"
        )
    tokens: list[str] = container.require("tokenizer.ggml.tokens")
    vocabulary: dict[str, int] = {}
    for number, token in enumerate(tokens):
        vocabulary.setdefault(token, number)
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(tokens, _token_types(container)),
        **_KINDS[kind](container, vocabulary),
        "post_processor": _post_processor(container, tokens),
    }
    return json.dumps(document, ensure_ascii=False)


def build_tokenizer_config(container: Container) -> Node:
    """tokenizer_config.json: the special tokens by role, and the chat template."""
    config: Node = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    tokens = container.metadata.get("tokenizer.ggml.tokens", [])
    roles = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    for role, name in roles.items():
        number = container.metadata.get(f"tokenizer.ggml.{name}_token_id")
        if number is not None and number < len(tokens):
            config[role] = tokens[number]
    config["add_bos_token"], config["add_eos_token"] = adds_bos(container), adds_eos(container)
    length = container.metadata.get(f"{container.require('general.architecture')}.context_length")
    if length is not None:
        config["model_max_length"] = length
    template = _chat_template(container)
    return config if template is None else config | {"chat_template": template}


def adds_bos(container: Container) -> bool:
    """Whether text is to begin with the beginning-of-sequence token: as the file says, else as its kind does."""
    stated = container.metadata.get("tokenizer.ggml.add_bos_token")
    if stated is not None:
        return bool(stated)
    return container.metadata.get("tokenizer.ggml.model") == "llama" or _pre_tokenizer(container).begins


def adds_eos(container: Container) -> bool:
    """Whether text is to end with the end-of-sequence token."""
    return bool(container.metadata.get("tokenizer.ggml.add_eos_token", False))


def _chat_template(container: Container) -> str | list[Node] | None:
    template = container.metadata.get("tokenizer.chat_template")
    names = container.metadata.get("tokenizer.chat_templates", [])
    if not names:
        return template
    named = [{"name": name, "template": container.require(f"tokenizer.chat_template.{name}")} for name in names]
    return ([{"name": "default", "template": template}] if template else []) + named


def _token_types(container: Container) -> list[int]:
    tokens = container.require("tokenizer.ggml.tokens")
    types: list[int] = container.metadata.get("tokenizer.ggml.token_type", [TokenType.NORMAL] * len(tokens))
    return types


def _added_tokens(tokens: list[str], types: list[int]) -> list[Node]:
    """Tokens that are found in the text before anything else is done to it."""
    special = (TokenType.CONTROL, TokenType.UNKNOWN)
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return [
        {"id": number, "content": token, **flags, "special": kind in special}
        for number, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if token and (kind in special or kind == TokenType.USER_DEFINED)
    ]


def _post_processor(container: Container, tokens: list[str]) -> Node:
    wanted = {"bos": adds_bos(container), "eos": adds_eos(container)}
    ids = {name: container.metadata.get(f"tokenizer.ggml.{name}_token_id") for name, adds in wanted.items() if adds}
    marks = {name: (number, tokens[number]) for name, number in ids.items() if number is not None}
    if not marks:
        return {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}

    def around(sequence: str, type_id: int) -> list[Node]:
        parts: list[Node] = [{"Sequence": {"id": sequence, "type_id": type_id}}]
        before = [{"SpecialToken": {"id": marks["bos"][1], "type_id": type_id}}] if "bos" in marks else []
        after = [{"SpecialToken": {"id": marks["eos"][1], "type_id": type_id}}] if "eos" in marks else []
        return before + parts + after

    return {
        "type": "TemplateProcessing",
        "single": around("A", 0),
        "pair": around("A", 0) + around("B", 1),
        "special_tokens": {
            token: {"id": token, "ids": [number], "tokens": [token]} for number, token in marks.values()
        },
    }


def _pre_tokenizer(container: Container) -> PreTokenizer:
    name = container.metadata.get("tokenizer.ggml.pre", "default")
    if name not in _BY_NAME:
        raise CheckpointError(
            f"{container.path} cuts text in a way called '{name}'; known are {', '.join(sorted(_BY_NAME))}"
        )
    return _BY_NAME[name]


def _byte_level(container: Container, vocabulary: dict[str, int]) -> Node:
    row = _pre_tokenizer(container)
    merges = [tuple(merge.split(" ", 1)) for merge in container.require("tokenizer.ggml.merges")]
    nodes = [NAMED_STEPS.get(step) or _split(step) for step in row.steps]
    if not any(node["type"] == "ByteLevel" for node in nodes):
        nodes.append(NAMED_STEPS["words"] | {"use_regex": False})
    if container.metadata.get("tokenizer.ggml.add_space_prefix", False):
        nodes = [node | {"add_prefix_space": True} if node["type"] == "ByteLevel" else node for node in nodes]
    return {
        "normalizer": {"type": "NFC"} if row.composed else None,
        "pre_tokenizer": nodes[0] if len(nodes) == 1 else {"type": "Sequence", "pretokenizers": nodes},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": _bpe_model(vocabulary, merges) | {"ignore_merges": row.whole_words},
    }


def _split(expression: str) -> Node:
    return {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}


def _sentencepiece(container: Container, vocabulary: dict[str, int]) -> Node:
    tokens: list[str] = container.require("tokenizer.ggml.tokens")
    stored = container.metadata.get("tokenizer.ggml.merges")
    merges = [tuple(merge.split(" ", 1)) for merge in stored] if stored else _merges_from_scores(container, vocabulary)
    unknown = tokens[container.metadata.get("tokenizer.ggml.unknown_token_id", 0)]
    visible: Node = {"type": "Replace", "pattern": {"String": " "}, "content": WORD_START}
    hidden: list[Node] = [
        {"type": "Replace", "pattern": {"String": WORD_START}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    prefix = bool(container.metadata.get("tokenizer.ggml.add_space_prefix", True))
    before: list[Node] = [{"type": "Prepend", "prepend": WORD_START}] if prefix else []
    after: list[Node] = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*before, visible]},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": hidden + after},
        "model": _bpe_model(vocabulary, merges) | {"unk_token": unknown, "fuse_unk": True, "byte_fallback": True},
    }


def _merges_from_scores(container: Container, vocabulary: dict[str, int]) -> list[tuple[str, ...]]:
    scores = container.require("tokenizer.ggml.scores")
    types = _token_types(container)
    normal = {token: number for token, number in vocabulary.items() if types[number] == TokenType.NORMAL}
    ranked: list[tuple[float, int, int, tuple[str, str]]] = []
    for token, number in normal.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in normal and right in normal:
                ranked.append((-scores[number], normal[left], normal[right], (left, right)))
    ranked.sort()
    return [pair for *_, pair in ranked]


def _bpe_model(vocabulary: dict[str, int], merges: list[tuple[str, ...]]) -> Node:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": vocabulary,
        "merges": merges,
    }


_KINDS: dict[str, Callable[[Container, dict[str, int]], Node]] = {"gpt2": _byte_level, "llama": _sentencepiece}
