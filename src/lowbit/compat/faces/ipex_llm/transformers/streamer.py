"""`ipex_llm.transformers.streamer`: the texts of a whole batch as they are made."""

from __future__ import annotations

from typing import Any

import torch
from transformers import TextIteratorStreamer

from lowbit.compat.missing import refuse_unknown


class BatchTextIteratorStreamer(TextIteratorStreamer):  # type: ignore[misc]
    """Hands out, step by step, a list with the new piece of each text of a batch."""

    def __init__(
        self, batch_size: int, tokenizer: Any, skip_prompt: bool = False, timeout: float | None = None, **decode: Any
    ) -> None:
        super().__init__(tokenizer, skip_prompt, timeout, **decode)
        self.next_tokens_are_prompt = True
        self.batch_size = batch_size
        self._tokens: list[list[int]] = [[] for _ in range(batch_size)]
        self._shown = [0] * batch_size

    def put(self, value: torch.Tensor) -> None:
        """Take the next tokens of every text, [batch] or [batch, n]."""
        if self.skip_prompt and self.next_tokens_are_prompt:
            self.next_tokens_are_prompt = False
            return
        for tokens, new in zip(self._tokens, value.reshape(self.batch_size, -1).tolist(), strict=True):
            tokens += new
        self.on_finalized_text(self._pieces(whole=False))

    def end(self) -> None:
        self.next_tokens_are_prompt = True
        self.on_finalized_text(self._pieces(whole=True), stream_end=True)

    def _pieces(self, whole: bool) -> list[str]:
        """What came to each text since the last time; up to the last blank, for a word may not be finished."""
        pieces = []
        for row, tokens in enumerate(self._tokens):
            text = self.tokenizer.decode(tokens, **self.decode_kwargs)
            end = len(text) if whole or text.endswith("\n") else text.rfind(" ") + 1
            pieces.append(text[self._shown[row] : end])
            self._shown[row] = max(self._shown[row], end)
        return pieces


__getattr__ = refuse_unknown(__name__, {})
