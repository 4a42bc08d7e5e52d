"""How likely an OpenVINO model finds some text: `losses_openvino.py MODEL WINDOWS` prints JSON, nats for each token of each text.

WINDOWS is JSON: windows of token ids by the name of their text. Computed in float32 without rounding activations, so that what is
compared is the weights.
"""

import json
import sys
from pathlib import Path

import numpy
import openvino

EXACT = {
    "INFERENCE_PRECISION_HINT": "f32",
    "KV_CACHE_PRECISION": "f32",
    "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
    "EXECUTION_MODE_HINT": "ACCURACY",
}


def main():
    model = openvino.Core().compile_model(f"{sys.argv[1]}/openvino_model.xml", "CPU", EXACT)
    request = model.create_infer_request()
    names = {name for given in model.inputs for name in given.names}
    found = {}
    for text, windows in json.loads(Path(sys.argv[2]).read_text()).items():
        found[text] = float(numpy.mean([losses(request, names, numpy.array([window])) for window in windows]))
    print(json.dumps(found))


def losses(request, names, ids):
    """The mean over a window, which is read at once by a model that remembers nothing."""
    length = ids.shape[1]
    given = {
        "input_ids": ids,
        "attention_mask": numpy.ones((1, length), numpy.int64),
        "position_ids": numpy.arange(length)[None],
        "beam_idx": numpy.zeros(1, numpy.int32),
    }
    request.reset_state()
    logits = request.infer({name: value for name, value in given.items() if name in names})[0][0, :-1].astype(
        numpy.float64
    )
    logits -= logits.max(-1, keepdims=True)
    chosen = numpy.take_along_axis(logits, ids[0, 1:, None], 1)[:, 0]
    return numpy.log(numpy.exp(logits).sum(-1)) - chosen


if __name__ == "__main__":
    main()
