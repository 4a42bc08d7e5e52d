"""LoRA adapters at run time: a low-rank product beside each product that an adapter names, its matrices inputs of the graph.

    y = W x  becomes  y = W x + B (A x)         A [rank, in], B [out, rank], scaled by weight * lora_alpha / rank

An adapter is a folder of peft's: adapter_config.json and adapter_model.safetensors. The product of a module is found by the name
that the graph has for it, which is the module's. Several adapters are one product: their A stand one above another, their B side
by side. What is switched off has rank 1 and zeros in A and B, so the graph is compiled once, and the weights of the model, which
may be of 4 bits, are never touched.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowbit.contents import missing, read_json
from lowbit.errors import CheckpointError, RecipeError, nearest, one_line
from lowbit.openvino.library import ops, ov
from lowbit.openvino.native.graph import parameter

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
Matrix = NDArray[np.float32]
# The last axis of [rows, tokens, channels].
_LAST = 2
_BASE = ".base_layer.weight"
_NAME = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<side>[AB])(?:\.\w+)?\.weight$")
# What peft can put into an adapter beside two matrices, with the value that leaves it out.
_PLAIN = {
    "use_dora": False,
    "bias": "none",
    "lora_bias": False,
    "modules_to_save": None,
    "trainable_token_indices": None,
}


@dataclass(frozen=True)
class Adapter:
    """A and B of each module, the scale in B."""

    pairs: Mapping[str, tuple[Matrix, Matrix]]


def read_adapter(folder: str | Path) -> Adapter:
    """An adapter as peft saves it."""
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise CheckpointError(missing(folder))
    config = read_json(folder / CONFIG)
    _refuse(folder, config)
    matrices = _read(folder / WEIGHTS)
    sides: dict[str, dict[str, Matrix]] = {}
    for name, matrix in matrices.items():
        found = _NAME.match(name)
        if found is None:
            raise CheckpointError(
                f"{folder / WEIGHTS} holds {name}, which is no LoRA of a linear layer: merge the adapter into the model "
                "(peft's merge_and_unload) and export that"
            )
        sides.setdefault(found["module"], {})[found["side"]] = matrix
    pairs = {}
    for module, side in sides.items():
        if len(side) != 2 or side["A"].shape[0] != side["B"].shape[1]:
            raise CheckpointError(f"{folder / WEIGHTS}: A and B of {module} do not belong together; get the file again")
        pairs[module] = (side["A"], side["B"] * np.float32(_scale(config, module)))
    return Adapter(pairs)


def _read(path: Path) -> dict[str, Matrix]:
    from lowbit.runtime.mapped import MappedFile
    from lowbit.runtime.stored import DENSE_TYPES, Dense

    if not path.is_file():
        raise CheckpointError(f"{path.parent} has no {path.name}: save the adapter with save_pretrained of peft")
    tensors = MappedFile(path).tensors
    odd = [f"{name} ({tensor.dtype})" for name, tensor in tensors.items() if tensor.dtype not in DENSE_TYPES]
    if odd or not tensors:
        raise CheckpointError(f"{path} holds no matrices of floating point numbers: {', '.join(odd) or 'it is empty'}")
    # peft puts the whole weight of an adapted head beside its two matrices: the graph has that one.
    own = {name for name in tensors if name.endswith(_BASE) and f"{name.removesuffix(_BASE)}.lora_A.weight" in tensors}
    return {
        n: np.array(Dense(t.view(), DENSE_TYPES[t.dtype]).float32(), np.float32)
        for n, t in tensors.items()
        if n not in own
    }


def _refuse(folder: Path, config: Mapping[str, Any]) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(
            f"{folder / CONFIG} describes an adapter of type {kind!r}: only LORA is put on at run time"
        )
    odd = {name: config[name] for name, plain in _PLAIN.items() if config.get(name) not in (plain, None, [])}
    if odd:
        raise CheckpointError(
            f"{folder / CONFIG} asks for {one_line(json.dumps(odd))}, which is more than two matrices: merge the adapter into "
            "the model (peft's merge_and_unload) and export that"
        )


def _scale(config: Mapping[str, Any], module: str) -> float:
    """lora_alpha / rank, or / sqrt(rank); either may differ by pattern."""
    rank = float(_by_pattern(config.get("rank_pattern"), module, config.get("r", 8)))
    alpha = float(_by_pattern(config.get("alpha_pattern"), module, config.get("lora_alpha", 8)))
    return alpha / rank**0.5 if config.get("use_rslora") else alpha / rank


def _by_pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    matching = (value for key, value in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", module))
    return next(matching, default)


class Adapters:
    """The adapters of one graph, which gets two inputs for each module that any of them names."""

    def __init__(self, model: Any, adapters: Mapping[str, Adapter]) -> None:
        self.by_name = dict(adapters)
        modules = {module: pair for adapter in adapters.values() for module, pair in adapter.pairs.items()}
        products = _products(model, modules) if modules else {}
        self._widths = {module: _put_beside(model, products[module], module, modules[module]) for module in modules}
        if modules:
            model.validate_nodes_and_infer_types()

    def weights(self, wanted: str | Collection[str] | Mapping[str, float] | None) -> dict[str, float]:
        """How strong each adapter is; None means all as they are."""
        if wanted is None:
            wanted = self.by_name
        named = [wanted] if isinstance(wanted, str) else wanted
        unknown = [name for name in named if name not in self.by_name]
        if unknown:
            known = nearest(unknown[0], self.by_name) if self.by_name else "the model was loaded without adapters"
            raise RecipeError(f"there is no adapter {unknown[0]!r}: {known}")
        if isinstance(wanted, Mapping) and wanted is not self.by_name:
            return {name: float(weight) for name, weight in wanted.items() if weight}
        return dict.fromkeys(named, 1.0)

    def tensors(self, weights: Mapping[str, float]) -> dict[str, Any]:
        """The inputs of the graph that put adapters on with these weights."""
        found = {}
        for module, (width, height) in self._widths.items():
            on = [(self.by_name[n].pairs[module], w) for n, w in weights.items() if module in self.by_name[n].pairs]
            down = [a for (a, _), _ in on] or [np.zeros((1, width), np.float32)]
            up = [b * np.float32(weight) for (_, b), weight in on] or [np.zeros((height, 1), np.float32)]
            found[f"{module}.lora_A"] = _tensor(np.concatenate(down))
            found[f"{module}.lora_B"] = _tensor(np.concatenate(up, axis=1))
        return found


def _tensor(array: Matrix) -> Any:
    """A tensor in memory of its own: one over the array would read what is freed with it."""
    made = ov.Tensor(ov.Type.f32, ov.Shape(list(array.shape)))
    made.data[:] = array
    return made


def _products(model: Any, modules: Collection[str]) -> dict[str, Any]:
    """The MatMul of each module. A traced graph calls it `__module.<module>/aten::linear/MatMul`."""
    nodes = [node for node in model.get_ordered_ops() if node.get_type_name() == "MatMul"]
    by_name = {node.get_friendly_name().removeprefix("__module.").partition("/")[0]: node for node in nodes}
    lost = [module for module in modules if module not in by_name]
    if lost:
        raise CheckpointError(
            f"the adapter changes {lost[0]}{f' and {len(lost) - 1} more' if len(lost) > 1 else ''}, and the graph has no "
            f"product of that name: is it the adapter of another model? {nearest(lost[0], by_name)}"
        )
    return {module: by_name[module] for module in modules}


def _put_beside(model: Any, product: Any, module: str, pair: tuple[Matrix, Matrix]) -> tuple[int, int]:
    width, height = pair[0].shape[1], pair[1].shape[0]
    inner, outer = product.input_value(0).get_partial_shape()[-1], product.output(0).get_partial_shape()[-1]
    if (inner.is_static and inner.get_length() != width) or (outer.is_static and outer.get_length() != height):
        raise CheckpointError(
            f"the adapter's {module} is {width} wide and {height} high, the model's {inner} and {outer}: "
            "it is the adapter of another model"
        )
    readers = list(product.output(0).get_target_inputs())
    source = _unordered(product.input_value(0))
    a = parameter(f"{module}.lora_A", [-1, width], ov.Type.f32)
    b = parameter(f"{module}.lora_B", [height, -1], ov.Type.f32)
    low = ops.matmul(source, a, False, True)
    total = ops.add(product, ops.matmul(low, b, False, True))
    for reader in readers:
        reader.replace_source_output(total.output(0))
    model.add_parameters([a, b])
    return width, height


def _unordered(source: Any) -> Any:
    """What comes into a module: a weight whose inputs were put in another order is given them in that order."""
    node = source.get_node()
    if node.get_type_name() != "Gather" or not _is_constant(node.input_value(1)) or _is_constant(node.input_value(0)):
        return source
    axis = node.input_value(2).get_node().get_data().item() if _is_constant(node.input_value(2)) else None
    return node.input_value(0) if axis in (-1, _LAST) else source


def _is_constant(port: Any) -> bool:
    return bool(port.get_node().get_type_name() == "Constant")
