"""The face of `intel_extension_for_pytorch`: `ipex.optimize`, `ipex.llm`, `ipex.quantization`, and what stands around them.

Importing it imports nothing: each name is found when a script uses it. `torch.compile(backend="ipex")` is answered by inductor,
which that backend became; it is entered among torch's backends when torch has its list of them.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

from lowbit import hook
from lowbit.compat.missing import refuse_unknown
from lowbit.compat.names import REFUSED, WORKS, Name

# The last release with binaries of its own; scripts compare it.
__version__ = "2.8.0"

_HERE = "lowbit.compat.faces.intel_extension_for_pytorch"
_REGISTRY = "torch._dynamo.backends.registry"
_FRONTEND = (
    "FP32MathMode",
    "OnDevice",
    "_set_optimized_model_for_generation",
    "disable_auto_channels_last",
    "enable_auto_channels_last",
    "enable_onednn_fusion",
    "fast_bert",
    "get_fp32_math_mode",
    "optimize",
    "set_fp32_math_mode",
    "set_logging_level",
    "verbose",
    "version",
)
_DEEPSPEED = (
    "lowbit on several devices, which is not there yet: one process with ipex.llm.optimize runs on all its cores"
)
_INFERENCE = "torch.compile, or ipex.optimize"

__all__ = ["FP32MathMode", "OnDevice", "llm", "optimize", "optimize_transformers", "quantization", "xpu"]
__getattr__ = refuse_unknown(
    __name__,
    {
        "deepspeed": _DEEPSPEED,
        "distributed": _DEEPSPEED,
        "jit": _INFERENCE,
        "fx": _INFERENCE,
        "compile": "torch.compile(model, backend='ipex'), or plain torch.compile",
        "compatible_mode": "the runner: python -m lowbit.compat script.py",
        "tpp": "ipex.fast_bert, or ipex.optimize",
    },
    homes=dict.fromkeys(_FRONTEND, f"{_HERE}.frontend") | {"optimize_transformers": f"{_HERE}.llm.frontend"},
)


def _register_backend(registry: ModuleType) -> None:
    """Enter "ipex" among the backends of torch.compile, once."""

    def ipex(graph: Any, inputs: Any, **options: Any) -> Any:
        from torch._inductor.compile_fx import compile_fx

        return compile_fx(graph, inputs)

    if "ipex" not in registry._COMPILER_FNS:  # asking for the list would import them all
        registry.register_backend(ipex)


hook.when_imported(_REGISTRY, _register_backend)

_UNIT = "tests/unit/test_compat_ipex.py::"
NAMES = (
    Name("torch.compile(backend='ipex')", "", WORKS, f"{_UNIT}test_the_backend_of_compile", "torch's inductor"),
    Name(
        "intel_extension_for_pytorch.deepspeed",
        "",
        REFUSED,
        f"{_UNIT}test_names_without_a_meaning_say_what_to_use",
        "comes with lowbit on several devices",
    ),
)
