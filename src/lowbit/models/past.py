"""What transformers calls the keys and values of a decoder: `past_key_values`, and `cache` from 5.24 on.

model(tokens, **{name_of_past(model.forward): held})      models of the hub keep the old name in newer releases
held = past_of(output)
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

PAST_NAMES = ("cache", "past_key_values")


def name_of_past(call: Callable[..., Any]) -> str:
    """The keyword under which this call takes the past; transformers' own where the call names neither."""
    known = inspect.signature(call).parameters
    return next((name for name in PAST_NAMES if name in known), None) or transformers_name()


@functools.cache
def transformers_name() -> str:
    """The name that `generate` of the installed transformers knows."""
    from transformers.generation import GenerateDecoderOnlyOutput

    return next(name for name in PAST_NAMES if name in GenerateDecoderOnlyOutput.__dataclass_fields__)


def past_of(output: Any) -> Any:
    """The past that a model's output carries, or None. The old name is asked last: newer outputs answer it with a warning."""
    return next((held for name in PAST_NAMES if (held := getattr(output, name, None)) is not None), None)
