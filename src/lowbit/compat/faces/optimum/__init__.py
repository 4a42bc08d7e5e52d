"""The face of `optimum`, of which lowbit answers what runs on OpenVINO: `optimum.intel` and `optimum.exporters.openvino`.

An `optimum` that is installed stays what it is, and only those two are answered in it.
"""

from __future__ import annotations

from lowbit.compat.missing import refuse_unknown

_ONNX = "an optimum of your own beside lowbit: lowbit answers what runs on OpenVINO, optimum.intel"
_OTHERS = (
    "onnxruntime",
    "onnx",
    "bettertransformer",
    "gptq",
    "neuron",
    "habana",
    "graphcore",
    "amd",
    "nvidia",
    "executorch",
)

__getattr__ = refuse_unknown(__name__, dict.fromkeys(_OTHERS, _ONNX))
