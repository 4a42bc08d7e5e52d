"""`ipex_llm.transformers.convert`: what scripts ask of it."""

from __future__ import annotations

from typing import Any

from lowbit.compat.ignored import say_ignored
from lowbit.compat.missing import refuse_unknown
from lowbit.compat.names import IGNORED, Name


def get_enable_ipex(_enable_ipex: bool | None = None) -> bool:
    """Whether another extension's kernels run the model: never, lowbit has its own."""
    return False


def convert_model_hybrid(model: Any) -> Any:
    """The model as it is: experts are packed like the rest, and all of it runs where it lies."""
    say_ignored("convert_model_hybrid", "the split into attention on a GPU and experts on the CPU", _ONE_PLACE)
    return model


_ONE_PLACE = "experts are packed like the rest, and a model runs on one device; device_map= says on which"

__getattr__ = refuse_unknown(__name__, {"ggml_convert_low_bit": "lowbit.optimize_model"})

_TEST = "tests/unit/test_compat_bigdl_stages.py::test_experts_stay_where_the_model_is"
NAMES = tuple(
    Name(f"ipex_llm.transformers.{place}convert_model_hybrid", "", IGNORED, _TEST, _ONE_PLACE)
    for place in ("", "convert.")
)
