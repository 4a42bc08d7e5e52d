"""`optimum.exporters`, of which `openvino` is answered."""

from __future__ import annotations

from lowbit.compat.missing import refuse_unknown

__getattr__ = refuse_unknown(__name__, dict.fromkeys(("onnx", "tflite", "executorch"), "optimum.exporters.openvino"))
