"""How text becomes tokens: what changed between transformers 4 and 5 without an error."""

from __future__ import annotations

import functools
from collections.abc import Iterator
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
