"""`ipex_llm.models`: models without torch, answered by lowbit's engine.

model = Llama("converted", n_threads=4)
tokens = model.generate(model.tokenize("Once upon a time"), max_new_tokens=32)
print(model.decode(tokens), model("Once upon a time", max_tokens=32)["choices"][0]["text"])
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lowbit.compat.ignored import say_ignored
from lowbit.compat.missing import refuse_unknown
from lowbit.core.threads import set_threads
from lowbit.runtime import load


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
        self,
        inputs: Sequence[int],
        max_new_tokens: int = 128,
        top_k: int = 40,
        top_p: float = 0.95,
        temperature: float = 0.80,
        repetition_penalty: float = 1.1,
        stop: str | Sequence[str] | None = (),
        **kwargs: Any,
    ) -> list[int]:
        """The tokens that continue `inputs`."""
        for name in kwargs:
            say_ignored("generate", name, "the engine has no such setting")
        answer = self.model.generate(
            list(inputs),
            max_new_tokens=max_new_tokens,
            top_k=top_k,
            top_p=top_p,
            temperature=temperature,
            repetition_penalty=repetition_penalty,
            stop=stop or (),
        )
        return list(answer.tokens)

    def __call__(self, prompt: str, max_tokens: int = 128, **kwargs: Any) -> dict[str, Any]:
        """A completion in the form that servers of that time gave."""
        ids = self.tokenize(prompt)
        tokens = self.generate(ids, max_new_tokens=max_tokens, **kwargs)
        counts = {"prompt_tokens": len(ids), "completion_tokens": len(tokens), "total_tokens": len(ids) + len(tokens)}
        reason = "length" if len(tokens) >= max_tokens else "stop"
        choice = {"text": self.decode(tokens), "index": 0, "logprobs": None, "finish_reason": reason}
        return {"object": "text_completion", "model": self.model_path, "choices": [choice], "usage": counts}


class Llama(_NativeModel):
    """Models of the family llama."""


class Gptneox(_NativeModel):
    """Models of the family gptneox."""


class Bloom(_NativeModel):
    """Models of the family bloom."""


class Starcoder(_NativeModel):
    """Models of the family starcoder."""


__getattr__ = refuse_unknown(__name__, {})
