"""`token_latency`: `generate` that gives, beside the tokens, how long each step took.

output, seconds = model.generate(ids, token_latency=True)        or model.config.token_latency = True beforehand
"""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

from torch import nn

from lowbit.bridge import EngineGenerate
from lowbit.bridge.clock import Clock
from lowbit.compat.names import WORKS, Name


class TimedGenerate(EngineGenerate):
    """lowbit's `generate`, with the seconds of each step where they are asked for."""

    def __deepcopy__(self, memo: dict[int, Any]) -> TimedGenerate:
        return TimedGenerate(copy.deepcopy(self.model, memo), self.cache)

    def __reduce__(self) -> tuple[Any, ...]:
        return (TimedGenerate, (self.model, self.cache))

    def __call__(
        self, inputs: Any = None, generation_config: Any = None, token_latency: bool | None = None, **kwargs: Any
    ) -> Any:
        wanted = getattr(self.model.config, "token_latency", False) if token_latency is None else token_latency
        if not wanted:
            return super().__call__(inputs, generation_config, **kwargs)
        clock = Clock()
        output = super().__call__(inputs, generation_config, clock=clock, **kwargs)
        return output, [later - earlier for earlier, later in pairwise([0.0, *clock.seconds])]


def time_tokens_(model: nn.Module) -> nn.Module:
    """Let `generate` of a model take `token_latency`."""
    if isinstance(getattr(model, "generate", None), EngineGenerate):
        model.generate = TimedGenerate(model)  # type: ignore[assignment]
    return model


_TEST = "tests/unit/test_compat_ipex_llm.py::test_the_seconds_of_each_token"
NAMES = (
    Name(
        "model.generate(token_latency=)", "", WORKS, _TEST, "of a model of ipex.llm.optimize; lowbit.bridge.clock.Clock"
    ),
    Name("model.config.token_latency", "", WORKS, _TEST, "of a model of ipex.llm.optimize"),
)
