"""The weights of an OpenVINO model as OpenVINO reads them, written as dense float32: `dump_openvino.py MODEL OUT`.

The decompression of each weight (constant, minus zero point, times scale) is cut out of the graph and run by OpenVINO
itself, so nothing about its formats is assumed here.
"""

import sys

import numpy
import openvino
from safetensors.numpy import save_file

FP32 = {"INFERENCE_PRECISION_HINT": "f32"}
MARK = "__module."


def main():
    model = openvino.Core().read_model(f"{sys.argv[1]}/openvino_model.xml")
    found = {}
    for node in model.get_ordered_ops():
        name = node.get_friendly_name().removeprefix(MARK)
        if node.get_type_name() == "MatMul" and "/aten::linear/" in name:
            found[f"{name.partition('/')[0]}.weight"] = value_of(node.input_value(1))
        elif node.get_type_name() == "Gather" and "embed_tokens" in name:
            found["model.embed_tokens.weight"] = value_of(node.input_value(0))
    save_file(found, sys.argv[2])


def value_of(output):
    part = openvino.Model([output], [])
    value = openvino.compile_model(part, "CPU", FP32)([])[0]
    return numpy.ascontiguousarray(value, numpy.float32)


if __name__ == "__main__":
    main()
