"""`generate(forced_decoder_ids=[(1, token), (2, token)])`: the first tokens of an answer, given by their places.

Today an answer is begun with `decoder_input_ids`, and Whisper, whose scripts are the ones that do this, reads the pairs from a
generation configuration alone.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

from lowbit.compat.replacing import Replacement
from lowbit.compat.shims.shim import say
from lowbit.errors import LowbitError

FORCED = "forced_decoder_ids"
_WHISPER = "whisper"


def forced_tokens(module: ModuleType) -> Iterator[Replacement]:
    """For every model that has not a `generate` of its own."""
    yield _with_forced(module.GenerationMixin)


def forced_tokens_of_whisper(module: ModuleType) -> Iterator[Replacement]:
    yield _with_forced(module.WhisperGenerationMixin)


def _with_forced(cls: Any) -> Replacement:
    original: Callable[..., Any] = cls.generate

    @functools.wraps(original)
    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        pairs = kwargs.pop(FORCED, None)
        if pairs and not _is_whisper(self):
            kwargs |= _begun(self, pairs, args, kwargs)
        elif pairs and len(args) > 1:  # the configuration is the second argument of every `generate`
            args = (args[0], _of_whisper(self, pairs, args[1]), *args[2:])
        elif pairs:
            kwargs["generation_config"] = _of_whisper(self, pairs, kwargs.get("generation_config"))
        return original(self, *args, **kwargs)

    return Replacement(cls, "generate", generate)


def _is_whisper(model: Any) -> bool:
    return bool(getattr(model.config, "model_type", None) == _WHISPER)


def _of_whisper(model: Any, pairs: Sequence[Any], given: Any) -> Any:
    """The configuration of a call, the model's own where none is given, with the pairs in it."""
    say(f"generate({FORCED}=)", "is read from generation_config today, or language= and task= say the same")
    config = copy.deepcopy(given or model.generation_config)
    config.task = config.language = None
    config.forced_decoder_ids = [tuple(pair) for pair in pairs]
    return config


def _begun(model: Any, pairs: Sequence[Any], args: tuple[Any, ...], given: dict[str, Any]) -> dict[str, Any]:
    import torch

    tokens = [token for _, token in sorted(map(tuple, pairs))]
    places = sorted(place for place, _ in pairs)
    if not model.config.is_encoder_decoder or None in tokens or places != list(range(1, len(tokens) + 1)):
        raise LowbitError(
            f"{FORCED}={pairs!r} cannot be begun with: use it with a model that has an encoder, a token for each place from 1 on"
        )
    say(f"generate({FORCED}=)", "is decoder_input_ids today, with the token that begins every answer in front")
    start = model.generation_config.decoder_start_token_id
    start = model.config.decoder_start_token_id if start is None else start
    tensors = [value for value in (*args, *given.values()) if isinstance(value, torch.Tensor)]
    begin = torch.tensor([[start, *tokens]], device=tensors[0].device)
    return {"decoder_input_ids": begin.expand(len(tensors[0]), -1)}
