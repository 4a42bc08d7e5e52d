"""A language model from a folder of OpenVINO's files to its answers, with numpy, openvino and tokenizers.

    from lowbit.openvino.native import load
    model = load("folder", device="CPU")
    print(model.chat("Why is the sky blue?"))

Neither torch nor transformers is imported. What answers is the same `Model` as in lowbit.runtime, which has every setting of its
own: choosing and drawing tokens, beams in groups, streams, conversations, stop strings. Only its engine differs: the graph in the
folder, run by OpenVINO on any of its devices, with adapters put on as the call says.
"""

from lowbit.openvino.native.adapters import Adapter, read_adapter
from lowbit.openvino.native.engine import IrEngine
from lowbit.openvino.native.loading import load
from lowbit.openvino.native.model import AdaptedModel

__all__ = ["AdaptedModel", "Adapter", "IrEngine", "load", "read_adapter"]
