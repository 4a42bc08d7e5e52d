"""The weights of an onnxruntime-genai int4 model, dequantised to float32: `dump_ort.py MODEL OUT`.

MatMulNBits: B uint8 [out, blocks, block / 2], low nibble first, scales [out * blocks], zero point 8 unless given.
"""

import re
import sys

import numpy
import onnx
from onnx import numpy_helper
from safetensors.numpy import save_file

PARTS = {"attn": "self_attn", "mlp": "mlp"}


def main():
    model = onnx.load(f"{sys.argv[1]}/model.onnx")
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    found = {}
    for node in model.graph.node:
        if node.op_type == "MatMulNBits":
            for name, value in named(node.name, dequantised(node, stored)):
                found[name] = value
    save_file(found, sys.argv[2])


def dequantised(node, stored):
    settings = {a.name: a.i for a in node.attribute}
    rows, cols, block = settings["N"], settings["K"], settings["block_size"]
    packed = numpy_helper.to_array(stored[node.input[1]]).reshape(rows, -1)
    scales = numpy_helper.to_array(stored[node.input[2]]).reshape(rows, -1).astype(numpy.float32)
    codes = numpy.stack([packed & 15, packed >> 4], -1).reshape(rows, -1).astype(numpy.float32)
    if len(node.input) > 3 and node.input[3]:
        pairs = numpy_helper.to_array(stored[node.input[3]]).reshape(rows, -1)
        zeros = numpy.stack([pairs & 15, pairs >> 4], -1).reshape(rows, -1)[:, : scales.shape[1]].astype(numpy.float32)
    else:
        zeros = numpy.full_like(scales, 8)
    values = (codes.reshape(rows, -1, block) - zeros[..., None]) * scales[..., None]
    return values.reshape(rows, -1)[:, :cols]


def named(name, value):
    """Names of a Hugging Face Llama; a fused q, k, v is named `qkv_proj` and is cut by whoever knows the heads."""
    if "lm_head" in name:
        return [("lm_head.weight", value)]
    layer, part, projection = re.search(r"layers\.(\d+)/(attn|mlp)/(\w+)/", name).groups()
    return [(f"model.layers.{layer}.{PARTS[part]}.{projection}.weight", value)]


if __name__ == "__main__":
    main()
