"""Guesses at the next tokens for one call of `generate`, from transformers' keywords for them.

    model.generate(ids, prompt_lookup_num_tokens=4)          what followed the last tokens when they stood there before
    model.generate(ids, assistant_model=small)               a small model with the same tokenizer
    model.generate(ids, draft=Draft(small, 8, Caution(0.8))) the same, with what transformers has no keyword for

The engine checks them in one step (see `runtime.speculate`), and the answer is the one without guesses, drawn or not.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lowbit.bridge.request import Request
from lowbit.errors import LowbitError
from lowbit.runtime.slots import Engine, Slot
from lowbit.runtime.speculate import Caution, DraftModel, Guesser, PromptLookup

_DEFAULT_GUESSES = 5


@dataclass(frozen=True)
class Draft:
    """A model that guesses for another, how many tokens at a time, and when it stops earlier."""

    model: Any
    count: int = _DEFAULT_GUESSES
    caution: Caution = field(default_factory=Caution)

    @classmethod
    def of(cls, assistant: Any) -> Draft:
        """A transformers assistant, which carries its own settings."""
        config = getattr(assistant, "generation_config", None)
        count = getattr(config, "num_assistant_tokens", None) or _DEFAULT_GUESSES
        return cls(
            assistant, int(count), Caution(float(getattr(config, "assistant_confidence_threshold", None) or 0.0))
        )

    def join(self, keywords: dict[str, Any]) -> None:
        """Guess in transformers' loop too."""
        config = self.model.generation_config
        config.num_assistant_tokens, config.num_assistant_tokens_schedule = self.count, "constant"
        config.assistant_confidence_threshold = self.caution.least
        keywords["assistant_model"] = self.model


def guesser(config: Any, draft: Draft | None, request: Request, engine: Engine) -> Guesser | None:
    """What guesses for a call, or None where nothing is to; a LowbitError says why the engine cannot have it."""
    lookup: Any = getattr(config, "prompt_lookup_num_tokens", None)
    if draft is None and not lookup:
        return None
    if request.slots > 1 or len(request.prompts[0]) != request.seen.shape[1]:
        raise LowbitError("guesses are made for one answer at a time, to a prompt without padding")
    if draft is None:
        longest = getattr(config, "max_matching_ngram_size", None)
        return PromptLookup(int(lookup), int(longest)) if longest else PromptLookup(int(lookup))
    other: Any = getattr(draft.model, "generate", None)
    refusal = other.model_refusal() if hasattr(other, "model_refusal") else "it is not a low-bit model"
    if refusal is not None:
        raise LowbitError(f"the engine cannot run the model that guesses: {refusal}")
    return DraftModel(Slot(other.engine(request.length)), draft.count, engine.spec.vocab_size, draft.caution)
