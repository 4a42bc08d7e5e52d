"""What commands get from whatever runs a model: an answer and its times."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

Message = dict[str, str]
Emit = Callable[[str], None]
# Text that is shown as it comes cannot be that of a beam search, which a model's generation config may ask for.
ONE_TEXT = {"num_beams": 1, "num_beam_groups": 1, "num_return_sequences": 1}


@dataclass(frozen=True)
class Answer:
    """What a model said. `token_seconds` holds when each token came, counted from the start."""

    text: str
    prompt_tokens: int
    token_seconds: tuple[float, ...]

    @property
    def new_tokens(self) -> int:
        return len(self.token_seconds)

    @property
    def first_token_seconds(self) -> float:
        return self.token_seconds[0] if self.token_seconds else 0.0

    @property
    def tokens_per_second(self) -> float:
        """The speed after the first token, which also pays for reading the prompt."""
        if self.new_tokens < 2:
            return 0.0
        return (self.new_tokens - 1) / max(self.token_seconds[-1] - self.token_seconds[0], 1e-9)
