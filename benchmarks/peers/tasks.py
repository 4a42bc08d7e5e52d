"""What is measured. A task is plain values, so that it travels to a worker as JSON and to a command as flags."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

LONG_PROMPT = 2048


@dataclass(frozen=True)
class Task:
    """One measurement.

    decode    `new` tokens, one at a time, after `context` tokens that were read before the clock starts
    prefill   `context` tokens at once, up to the logits after the last
    batch     `new` steps of `sequences` sequences, each after `context` tokens of its own
    start     seconds from the start of a process to the first token after a prompt of `context` tokens
    memory    the most megabytes that a process holds which loads, reads `context` tokens and makes `new`
    interrupt seconds from Ctrl-C to the end of the call, in the middle of `context` tokens or, after them, of `new`
    generate  as decode, through `model.generate` of transformers
    repack    GB/s of packed bytes at which the weights of `context` rows are laid out for the products
    """

    kind: str
    context: int
    new: int = 0
    sequences: int = 1

    @property
    def unit(self) -> str:
        return {"start": "s", "interrupt": "s", "memory": "MB", "repack": "GB/s"}.get(self.kind, "tok/s")

    @property
    def less_is_better(self) -> bool:
        return self.kind in ("start", "memory", "interrupt")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def shorter(self, share: int) -> Task:
        """The same task for a first look: fewer new tokens, the same context, at most half of a very long prompt."""
        context = min(self.context, LONG_PROMPT) if self.kind == "prefill" else self.context
        return Task(self.kind, context, max(8, self.new // share) if self.new else 0, self.sequences)
