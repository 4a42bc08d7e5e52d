"""`neural_compressor.transformers.generation`: loops that scripts set into a model to time its tokens.

They are only ever handed to `ipex.transformers.optimize.convert_function`. transformers has one loop today, and the times come
from `model.config.token_latency`; so these two are names to hand on, and refuse to be called.
"""

from __future__ import annotations

from typing import Any

from lowbit.compat.missing import refuse_unknown
from lowbit.compat.names import REFUSED, Name
from lowbit.errors import LowbitError

__getattr__ = refuse_unknown(__name__, {})
_UNIT = "tests/unit/test_compat_neural_compressor.py::test_loops_are_names_to_hand_on"
_REMARK = "a name to hand on, which is not called; config.token_latency tells the times"
NAMES = tuple(
    Name(
        f"neural_compressor.transformers.generation.{name}",
        "",
        REFUSED,
        _UNIT,
        "a name to hand on, which is not called; config.token_latency tells the times",
    )
    for name in ("_greedy_search", "_beam_search")
)


def _greedy_search(*_: Any, **__: Any) -> Any:
    raise LowbitError("this loop is not called by itself: use model.generate(..., num_beams=1)")


def _beam_search(*_: Any, **__: Any) -> Any:
    raise LowbitError("this loop is not called by itself: use model.generate(..., num_beams=4)")
