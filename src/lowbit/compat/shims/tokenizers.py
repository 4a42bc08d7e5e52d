"""How text becomes tokens: what changed between transformers 4 and 5 without an error."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import ModuleType
from typing import Any

from lowbit.compat.replacing import Replacement
from lowbit.compat.shims.shim import say

LLAMA_CLASSES = ("LlamaTokenizer", "LlamaTokenizerFast")
_WORDS_TO_FIND_IT = ("cache_dir", "force_download", "proxies", "token", "revision", "local_files_only", "subfolder")
# AutoTokenizer may come back to this class; the second time it is meant.
_choosing: ContextVar[bool] = ContextVar("choosing", default=False)


def llama_tokenizer(module: ModuleType) -> Iterator[Replacement]:
    """LlamaTokenizer builds Llama 2's splitting of words around whatever vocabulary a folder has, and loses its spaces."""
    cls = module.LlamaTokenizer
    original = cls.from_pretrained.__func__

    @functools.wraps(original)
    def from_pretrained(cls: Any, name: Any, *args: Any, **kwargs: Any) -> Any:
        from transformers import AutoTokenizer

        kind = None if _choosing.get() else saved_class(name, kwargs)
        if kind is None or kind in LLAMA_CLASSES or cls.__name__ not in LLAMA_CLASSES:
            return original(cls, name, *args, **kwargs)
        say(f"{cls.__name__}.from_pretrained", f"of a folder whose tokenizer is a {kind} loads that one")
        mark = _choosing.set(True)
        try:
            return AutoTokenizer.from_pretrained(name, *args, **kwargs)
        finally:
            _choosing.reset(mark)

    yield Replacement(cls, "from_pretrained", classmethod(from_pretrained))


def saved_class(name: Any, keywords: dict[str, Any]) -> str | None:
    """The class that a folder says its tokenizer has."""
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    config = get_tokenizer_config(name, **{word: keywords[word] for word in _WORDS_TO_FIND_IT if word in keywords})
    kind = config.get("tokenizer_class")
    return kind if isinstance(kind, str) else None


def chat_template(module: ModuleType) -> Iterator[Replacement]:
    """Chats became dictionaries: scripts of old hand the result to `generate` as the tokens that it was."""
    cls = module.PreTrainedTokenizerBase
    original = cls.apply_chat_template

    @functools.wraps(original)
    def apply_chat_template(self: Any, *args: Any, **kwargs: Any) -> Any:
        if "return_dict" in kwargs or not kwargs.get("tokenize", True) or kwargs.get("return_assistant_tokens_mask"):
            return original(self, *args, **kwargs)
        say("apply_chat_template", "returns a dictionary today; without return_dict it returns the tokens here")
        return original(self, *args, return_dict=False, **kwargs)

    yield Replacement(cls, "apply_chat_template", apply_chat_template)


def words_of_old(module: ModuleType) -> Iterator[Replacement]:
    """What a tokenizer had beside `__call__`, where it has it no longer."""
    cls = module.PreTrainedTokenizerBase

    def encode_plus(self: Any, text: Any, text_pair: Any = None, *args: Any, **kwargs: Any) -> Any:
        say("tokenizer.encode_plus", "is tokenizer(...) today")
        # The places of the others are those of today's call but for the targets, which came later.
        return self(text, text_pair, None, None, *args, **kwargs)

    def batch_encode_plus(self: Any, batch_text_or_text_pairs: Any, *args: Any, **kwargs: Any) -> Any:
        say("tokenizer.batch_encode_plus", "is tokenizer(...) today")
        texts = list(batch_text_or_text_pairs)
        if texts and isinstance(texts[0], tuple):
            return self(*map(list, zip(*texts, strict=True)), None, None, *args, **kwargs)
        return self(texts, None, None, None, *args, **kwargs)

    @contextmanager
    def as_target_tokenizer(self: Any) -> Iterator[None]:
        say("tokenizer.as_target_tokenizer", "is tokenizer(text_target=...) today")
        there, back = (getattr(type(self), f"_switch_to_{mode}_mode", None) for mode in ("target", "input"))
        self._in_target_context_manager = True
        try:
            if there is not None:
                there(self)
            yield
        finally:
            self._in_target_context_manager = False
            if back is not None:
                back(self)

    def special_tokens(end: str) -> property:
        old, now = f"additional_special_tokens{end}", f"extra_special_tokens{end}"

        def find(self: Any) -> Any:
            say(f"tokenizer.{old}", f"is called {now} today")
            return getattr(self, now)

        return property(find, lambda self, value: setattr(self, now, value))

    words = {
        "encode_plus": encode_plus,
        "batch_encode_plus": batch_encode_plus,
        "as_target_tokenizer": as_target_tokenizer,
        "additional_special_tokens": special_tokens(""),
        "additional_special_tokens_ids": special_tokens("_ids"),
    }
    for name, value in words.items():
        if not hasattr(cls, name):
            yield Replacement(cls, name, value)
