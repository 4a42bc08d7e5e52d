"""Keys and values: a tuple of pairs once, an object today. Scripts index it, count it, and hand tuples of their own to models."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from lowbit.compat.replacing import Replacement
from lowbit.compat.shims.shim import say

PAST = "past_key_values"


def pair(layer: Any) -> tuple[Any, ...]:
    """The keys and values of a layer, and the width of its window if it has one."""
    window = getattr(layer, "_sliding_window_tensor", None)
    return (layer.keys, layer.values) if window is None else (layer.keys, layer.values, window)


def old_caches(module: ModuleType) -> Iterator[Replacement]:
    """What could be done with a cache in transformers 4."""
    cache, dynamic = module.Cache, module.DynamicCache

    def used(name: str) -> None:
        say(f"past_key_values{name}", "is a Cache today; its layers are given as pairs")

    def index(self: Any, layer: int) -> tuple[Any, ...]:
        used("[...]")
        return pair(self.layers[layer])

    def each(self: Any) -> Iterator[tuple[Any, ...]]:
        return (pair(layer) for layer in self.layers)

    def to_legacy_cache(self: Any) -> tuple[Any, ...]:
        used(".to_legacy_cache")
        return tuple(each(self))

    def keys_or_values(name: str, of: str) -> property:
        def get(self: Any) -> list[Any]:
            used(name)
            return [getattr(layer, of) for layer in self.layers]

        return property(get)

    def seen_tokens(self: Any) -> int:
        used(".seen_tokens")
        return int(self.get_seq_length())

    def from_legacy_cache(cls: Any, past_key_values: Any = None) -> Any:
        used(".from_legacy_cache")
        return cls() if past_key_values is None else cls(tuple(layer[:2] for layer in past_key_values))

    def get_usable_length(self: Any, new_seq_length: int, layer_idx: int | None = 0) -> int:
        used(".get_usable_length")
        longest = getattr(self, "get_max_length", None) or self.get_max_cache_shape  # by its name in older versions
        held, most = self.get_seq_length(layer_idx or 0), longest() or -1
        return most - new_seq_length if 0 < most < held + new_seq_length else held

    names = {
        "__getitem__": index,
        "to_legacy_cache": to_legacy_cache,
        "get_usable_length": get_usable_length,
        "seen_tokens": property(seen_tokens),
        "key_cache": keys_or_values(".key_cache", "keys"),
        "value_cache": keys_or_values(".value_cache", "values"),
    }
    for name, value in names.items():
        if not hasattr(cache, name):
            yield Replacement(cache, name, value)
    yield Replacement(dynamic, "__iter__", each)
    if not hasattr(dynamic, "from_legacy_cache"):
        yield Replacement(dynamic, "from_legacy_cache", classmethod(from_legacy_cache))


def as_cache(past: Any) -> Any:
    """A tuple of pairs as a cache, everything else as it is."""
    if not isinstance(past, tuple | list):
        return past
    from transformers import DynamicCache

    say("past_key_values=(...)", "as a tuple is no cache today; it is made one")
    return DynamicCache(tuple(layer[:2] for layer in past))


def tuples_to_models(module: ModuleType) -> Iterator[Replacement]:
    """A model that is called with a tuple gets a cache."""
    cls = module.PreTrainedModel
    original = cls.__call__

    @functools.wraps(original)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get(PAST) is not None:
            kwargs[PAST] = as_cache(kwargs[PAST])
        return original(self, *args, **kwargs)

    yield Replacement(cls, "__call__", call)


def tuples_to_generate(module: ModuleType) -> Iterator[Replacement]:
    cls = module.GenerationMixin
    original = cls.generate

    @functools.wraps(original)
    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get(PAST) is not None:
            kwargs[PAST] = as_cache(kwargs[PAST])
        return original(self, *args, **kwargs)

    yield Replacement(cls, "generate", generate)
