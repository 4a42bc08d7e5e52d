"""What the products of a graph are given while it runs on some inputs: the statistics by which weights are rounded.

Each product's first input becomes an output of the model for as long as it runs, on the CPU and in float32. Products that read one
value share its statistics. Hessians are squares of the width, so that only as many are collected in one run over the inputs as
fit into a gigabyte, and the inputs are run again for the rest.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import torch

from lowbit.algorithms.statistics import Statistics
from lowbit.errors import RecipeError
from lowbit.openvino.library import core
from lowbit.openvino.sites import Array, Site

_MOST_BYTES = 1 << 30
_NO_NUMBERS = "USO"  # numpy's kinds: text, bytes, anything else
EXACT = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0", "KV_CACHE_PRECISION": "f32"}


@dataclass
class Seen:
    """Of one input of products: its statistics, the sum of its values [in], and some of its rows [tokens, in]."""

    statistics: Statistics
    total: torch.Tensor
    rows: list[torch.Tensor] = field(default_factory=list)

    def add_(self, x: torch.Tensor, rows: int) -> None:
        """Take an input [.., in] into account; so many of its rows are kept."""
        flat = x.reshape(-1, x.shape[-1])
        self.statistics.add_(flat)
        self.total += flat.sum(0)
        if rows:
            self.rows.append(flat[:: max(len(flat) // rows, 1)][:rows].clone())

    def divided(self, scale: torch.Tensor) -> Seen:
        """What is seen of the input divided by a scale [in], but for its rows."""
        return Seen(self.statistics.divided(scale), self.total / scale)

    @property
    def variance(self) -> torch.Tensor:
        mean = self.total / max(self.statistics.tokens, 1)
        return (self.statistics.mean_square - mean.square()).clamp_min(0)


def collect(
    model: Any, sites: Sequence[Site], data: Iterable[Any], subset: int, hessian: bool, rows: int = 0
) -> dict[str, Seen]:
    """The statistics of the inputs of linear sites, by name; about so many of their rows, of all items together."""
    items = list(islice(data, subset))
    if not items:
        raise RecipeError("the dataset is empty: give at least one input of the model")
    sources: dict[tuple[str, int], list[Site]] = {}
    for site in sites:
        products = [use for use in site.uses if use.role == "linear"]
        if products and not products[0].operation.get_attributes()["transpose_a"]:
            source = products[0].operation.input_value(0)
            sources.setdefault((source.get_node().get_friendly_name(), source.get_index()), []).append(site)
    found: dict[str, Seen] = {}
    for batch in _batches(list(sources.values()), hessian):
        for group, seen in zip(batch, _run(model, batch, items, hessian, rows), strict=True):
            found |= {site.name: seen for site in group}
    return found


def _batches(groups: list[list[Site]], hessian: bool) -> Iterator[list[list[Site]]]:
    batch: list[list[Site]] = []
    held = 0
    for group in groups:
        size = 4 * group[0].shape[-1] ** 2 if hessian else 0
        if batch and held + size > _MOST_BYTES:
            yield batch
            batch, held = [], 0
        batch.append(group)
        held += size
    if batch:
        yield batch


def _run(model: Any, batch: list[list[Site]], items: list[Any], hessian: bool, rows: int) -> list[Seen]:
    """Run the model over all items with the inputs of a batch of sites as further outputs."""
    own = len(model.outputs)
    sources = [next(use for use in group[0].uses if use.role == "linear").operation.input_value(0) for group in batch]
    added = model.add_outputs(sources)
    try:
        request = core().compile_model(model, "CPU", EXACT).create_infer_request()
        seen = [
            Seen(Statistics(group[0].shape[-1], "cpu", hessian), torch.zeros(group[0].shape[-1])) for group in batch
        ]
        each = -(-rows // len(items))
        for item in items:
            request.reset_state()
            request.infer(inputs_of(model, item))
            for place, one in enumerate(seen):
                one.add_(torch.from_numpy(np.asarray(request.get_output_tensor(own + place).data, np.float32)), each)
        return seen
    finally:
        for output in added:
            model.remove_result(output.get_node())


def inputs_of(model: Any, item: Any) -> dict[str, Array]:
    """An item of a dataset as the inputs of a model by name: a mapping, values in order, or one value.

    What a decoder needs beside its tokens is made where the item does not have it.
    """
    names = [port.get_any_name() for port in model.inputs]
    if isinstance(item, Mapping):
        given = {str(name): value for name, value in item.items()}
    else:
        values = list(item) if isinstance(item, list | tuple) else [item]
        given = dict(zip(names, values, strict=False))
    arrays = {name: np.asarray(value) for name, value in given.items() if name in names}
    if not arrays:
        raise RecipeError(f"an item of the dataset names {', '.join(given)}, and the model takes {', '.join(names)}")
    for name, array in arrays.items():
        if array.dtype.kind in _NO_NUMBERS:
            raise RecipeError(
                f"an item of the dataset has {str(given[name])[:40]!r} for {name}, which takes numbers: give what a tokenizer "
                "makes of texts (nncf.Dataset(texts, transform_func=...))"
            )
    first = next(iter(arrays.values()))
    for port in model.inputs:
        name = port.get_any_name()
        if name not in arrays:
            arrays[name] = _missing(name, first, arrays)
        arrays[name] = arrays[name].astype(port.get_element_type().to_dtype(), copy=False)
    return arrays


def _missing(name: str, first: Array, given: Mapping[str, Array]) -> Array:
    rows = first.shape[0] if first.ndim else 1
    mask = given.get("attention_mask", np.ones(first.shape[:2], np.int64))
    if name == "attention_mask":
        return mask
    if name == "position_ids":
        positions: Array = np.maximum(mask.cumsum(-1) - 1, 0)[:, -first.shape[1] :]
        return positions
    if name == "token_type_ids":
        return np.zeros_like(mask)
    if name == "beam_idx":
        return np.arange(rows, dtype=np.int32)
    raise RecipeError(f"an item of the dataset has no {name}: its transform_func has to give every input of the model")
