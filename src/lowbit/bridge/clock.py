"""When each step of a `generate` was done, whichever loop runs it.

    clock = Clock()
    model.generate(ids, max_new_tokens=32, clock=clock)      clock.seconds: from the start to each step

The engine ticks once a step; to transformers' own loop the clock is a stopping criterion that stops nothing, which it asks once a
step as well. With beams or guesses a step may make several tokens or none that stays.
"""

from __future__ import annotations

import time
from typing import Any

import torch
import transformers


class Clock(transformers.StoppingCriteria):  # type: ignore[misc]
    """Seconds from the start to each step."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.seconds: list[float] = []

    def tick(self) -> None:
        self.seconds.append(time.perf_counter() - self.start)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        if input_ids.device.type != "cpu":
            torch.accelerator.synchronize()  # a step that was only launched is not done
        self.tick()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def join(self, keywords: dict[str, Any]) -> None:
        """Tick in transformers' loop too."""
        given = keywords.get("stopping_criteria") or []
        keywords["stopping_criteria"] = transformers.StoppingCriteriaList([*given, self])
