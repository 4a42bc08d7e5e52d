"""`ipex_llm.models`: models without torch, answered by lowbit's engine.

model = Llama("converted", n_threads=4)
tokens = model.generate(model.tokenize("Once upon a time"), max_new_tokens=32)
print(model.decode(tokens), model("Once upon a time", max_tokens=32)["choices"][0]["text"])
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lowbit.compat.ignored import say_ignored
from lowbit.compat.missing import refuse_unknown
from lowbit.core.threads import set_threads
from lowbit.runtime import load

# How the old library drew tokens where nothing was said.
_DRAWN = {"top_k": 40, "top_p": 0.95, "temperature": 0.80, "repetition_penalty": 1.1}


class _NativeModel:
    """What the four classes share: the engine finds out itself what family a model is of."""

    def __init__(
        self, model_path: str | Path, n_ctx: int | None = None, n_threads: int | None = None, **kwargs: Any
    ) -> None:
        for name in kwargs:
            say_ignored(type(self).__name__, name, "the engine has no such setting")
        if n_threads and n_threads > 0:
            set_threads(n_threads)
        self.model_path = str(model_path)
        self.model = load(model_path, context=n_ctx)

    def tokenize(self, text: str | bytes, add_bos: bool = True) -> list[int]:
        text = text.decode() if isinstance(text, bytes) else text
        return self.model.tokenizer.encode(text, special=add_bos)

    def decode(self, tokens: Sequence[int]) -> str:
        return self.model.tokenizer.decode(list(tokens))

    def batch_decode(self, tokens: Sequence[Sequence[int]]) -> list[str]:
        return [self.decode(row) for row in tokens]

    def generate(
        self, inputs: Sequence[int], max_new_tokens: int = 128, stop: str | Sequence[str] | None = (), **kwargs: Any
    ) -> list[int]:
        """The tokens that continue `inputs`; drawn as that library drew them, unless `temperature` and its like say otherwise."""
        settings = _DRAWN | kwargs | {"stop": stop or ()}
        answer = self.model.generate(list(inputs), max_new_tokens=max_new_tokens, **settings)
        return list(answer.tokens)

    def __call__(self, prompt: str, max_tokens: int = 128, stream: bool = False, **kwargs: Any) -> Any:
        """A completion in the form that servers of that time gave, or with `stream` its pieces, one after another."""
        ids = self.tokenize(prompt)
        if stream:
            return self._pieces(ids, max_tokens, kwargs)
        tokens = self.generate(ids, max_new_tokens=max_tokens, **kwargs)
        counts = {"prompt_tokens": len(ids), "completion_tokens": len(tokens), "total_tokens": len(ids) + len(tokens)}
        reason = "length" if len(tokens) >= max_tokens else "stop"
        return self._completion(self.decode(tokens), reason) | {"usage": counts}

    def _pieces(self, ids: list[int], max_tokens: int, settings: dict[str, Any]) -> Iterator[dict[str, Any]]:
        for piece in self.model.stream(ids, max_new_tokens=max_tokens, **_DRAWN | settings):
            yield self._completion(piece.text, piece.finish)

    def _completion(self, text: str, reason: str | None) -> dict[str, Any]:
        choice = {"text": text, "index": 0, "logprobs": None, "finish_reason": reason}
        return {"object": "text_completion", "model": self.model_path, "choices": [choice]}


class Llama(_NativeModel):
    """Models of the family llama."""


class Gptneox(_NativeModel):
    """Models of the family gptneox."""


class Bloom(_NativeModel):
    """Models of the family bloom."""


class Starcoder(_NativeModel):
    """Models of the family starcoder."""


__getattr__ = refuse_unknown(__name__, {})
