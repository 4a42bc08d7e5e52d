"""Changes to a language model's graph before it is compiled.

    ask_for_logits      logits = head(h)   becomes   logits = head(h[:, logits_at])

A prompt needs the logits after its last token alone, and the head is a fifth of a small model's work: with the input `logits_at`
the product is made for the positions that the caller names.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from lowbit.openvino.library import ops, ov
from lowbit.openvino.native.rows import LOGITS, WANTED

# What may stand between the head's product and the result: each makes one number of one number.
_AFTER_THE_HEAD = ("Add", "Multiply", "Divide", "Subtract", "Tanh", "Convert", "Clamp")
_SEQUENCE_AXIS = 1


def ask_for_logits(model: Any) -> bool:
    """Add the input `logits_at`; False, and the graph as it was, where the head is not found."""
    node = model.output(LOGITS).get_node()
    node = node.input_value(0).get_node()
    while node.get_type_name() in _AFTER_THE_HEAD:
        node = node.input_value(0).get_node()
    if node.get_type_name() != "MatMul" or node.input_value(0).get_partial_shape().rank.get_length() != 3:
        return False
    wanted = parameter(WANTED, [-1], ov.Type.i64)
    hidden = node.input_value(0)
    picked = ops.gather(hidden, wanted, ops.constant(np.int64(_SEQUENCE_AXIS)))
    node.input(0).replace_source_output(picked.output(0))
    model.add_parameters([wanted])
    model.validate_nodes_and_infer_types()
    return True


def parameter(name: str, shape: list[int], kind: Any) -> Any:
    """An input of a graph that is found by its name."""
    made = ops.parameter(shape, kind, name=name)
    made.output(0).get_tensor().set_names({name})
    return made
