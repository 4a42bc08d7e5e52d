"""The saved form of a model: which method its config.json names, and which tensors stand in its files.

compressed-tensors where it can say everything (see `compressed.py`), else lowbit's own method: the canonical buffers
under the names of the state dict (`...q_proj.packed_weight.codes`), and in the configuration the format of every path.
One weight that compressed-tensors cannot express puts the whole folder under the own method, and `reason` says which.

compressed-tensors folders keep a packed embedding dense, because transformers and vLLM read no other: the packed one
unpacked, so the numbers are the same. A head tied to it is written packed, config.json says that the two are separate,
and `tied` in lowbit's own part lets lowbit share the packed weight again and leave the dense copy unread. An embedding
that is not tied lies packed in a file of its own (`ASIDE`, in a folder below, where other readers do not look), and
`packed` in lowbit's own part gives its format. Under the own method every weight is stored once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lowbit.checkpoint import compressed
from lowbit.checkpoint.hf_names import expert_sources, is_transformers_model
from lowbit.checkpoint.layout import Held, dense_modules, dense_tensors, held_weights
from lowbit.methods import COMPRESSED_METHOD, OWN_METHOD
from lowbit.packing import PackedTensor

VERSION = 1
ASIDE = "lowbit/embedding.safetensors"


@dataclass(frozen=True)
class SavedForm:
    """How a model is written.

    `reason` says why it is not compressed-tensors, `untie` that config.json must part head and embedding, and `sources` what the
    experts of a fused weight are called in the checkpoint.
    """

    method: str
    fields: dict[str, Any]
    reason: str = ""
    untie: bool = False
    sources: dict[str, list[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Part:
    """Some tensors of a file, made when they are written: a prepared weight goes back to its canonical form one at a time."""

    nbytes: int
    make: Callable[[], dict[str, torch.Tensor]]


def saved_form(model: nn.Module, recipe: dict[str, Any] | None = None, compact: bool = False) -> SavedForm:
    """Choose the form for a model; `compact` asks for the own one."""
    held = held_weights(model)
    sources: dict[str, list[str]] = {}
    reason = "a compact folder was asked for" if compact else _refusal(model, held, sources)
    tied = {h.path: h.tied_to for h in held if h.tied_to}
    own: dict[str, Any] = {"version": VERSION, "recipe": recipe or {}, "tied": tied, "report": _summary(model)}
    if reason:
        layers: dict[str, list[str]] = {}
        for h in held:
            if not h.tied_to:
                layers.setdefault(h.weight.format.name, []).append(h.path)
        return SavedForm(OWN_METHOD, {"quant_method": OWN_METHOD, **own, "layers": layers, "reason": reason}, reason)
    dense = [h.path for h in held if h.role == "embedding"]
    linears = {h.path: h.weight.format for h in held if h.role == "linear"}
    experts = next((h.weight.format for h in held if h.role == "experts"), None)
    fields = compressed.config_for(linears, experts, [*dense_modules(model), *dense])
    own["packed"] = {h.path: h.weight.format.name for h in _aside(held)}
    if not all(format.symmetric for format in linears.values()):
        # transformers can place packed zero points only while it unpacks (compressed-tensors 0.20 gives them another shape).
        fields["dequantize"] = True
    return SavedForm(COMPRESSED_METHOD, fields | {OWN_METHOD: own}, untie=bool(tied), sources=sources)


def _refusal(model: nn.Module, held: list[Held], sources: dict[str, list[str]]) -> str | None:
    """Why a model cannot be saved as compressed-tensors, or None. Fills in what its experts are called in the checkpoint."""
    if not is_transformers_model(model):
        return "it is not a transformers model"
    for h in held:
        reason = compressed.refusal(h)
        if reason:
            return f"{h.path}: {reason}"
        if h.role == "experts":
            found = expert_sources(model, h.path)
            if found is None or any(name.endswith("_bias") for name, _ in h.module.named_parameters(recurse=False)):
                return f"{h.path}: its experts are not separate linears in the checkpoint"
            sources[h.path] = found
    if len({h.weight.format for h in held if h.role == "experts"}) > 1:
        return "its experts have different formats"
    formats = {h.weight.format for h in held if h.role != "embedding"}
    if len({format.act_bits for format in formats}) > 1:
        return "some layers round activations and others do not"
    if len(formats) > 1 and not all(format.symmetric for format in formats):
        return "transformers reads zero points from it only where all layers have one format"
    if any(h.role == "experts" and not h.weight.format.symmetric for h in held):
        return "transformers does not read the zero points of experts from it"
    return _tie_refusal(model, held)


def _tie_refusal(model: nn.Module, held: list[Held]) -> str | None:
    """Ties beyond one head and one embedding mean more to a model than where a weight is stored (T5 scales by it)."""
    tied = [h for h in held if h.tied_to]
    if not tied:
        return None
    others = set(getattr(model, "all_tied_weights_keys", None) or {}) - {f"{h.path}.weight" for h in tied}
    config = model.config
    owner = next(h for h in held if h.path == tied[0].tied_to)
    is_pair = len(tied) == 1 and {tied[0].role, owner.role} == {"linear", "embedding"}
    if not is_pair or others or getattr(config, "is_encoder_decoder", False):
        return f"{tied[0].path}: it shares its weight in a way that compressed-tensors cannot say"
    return None


def _summary(model: nn.Module) -> dict[str, Any]:
    report = getattr(model, "lowbit_report", None)
    if report is None:
        return {}
    numbers = {"bytes_before": report.bytes_before, "bytes_after": report.bytes_after}
    return numbers | {"bits_per_weight": round(report.bits_per_weight, 4), "formats": report.formats()}


def parts(model: nn.Module, form: SavedForm) -> Iterator[Part]:
    """Everything that goes into a model's files, under the model's own names."""
    for h in held_weights(model):
        if form.method == COMPRESSED_METHOD and h.role == "embedding":
            dense_bytes = h.weight.dtype.itemsize * h.weight.shape[0] * h.weight.shape[1]
            yield Part(dense_bytes, lambda h=h: {f"{h.path}.weight": h.weight.dense()})  # type: ignore[misc]
        elif not h.tied_to or form.untie:
            yield Part(_size(h), _maker(h, form))
    for name, tensor in dense_tensors(model):
        yield Part(tensor.nbytes, lambda name=name, tensor=tensor: {name: tensor.contiguous()})  # type: ignore[misc]


def packed_aside(model: nn.Module, form: SavedForm) -> dict[str, torch.Tensor]:
    """The packed form of what is dense in the files of a compressed-tensors folder: embeddings that no head stands for."""
    tensors: dict[str, torch.Tensor] = {}
    for h in _aside(held_weights(model)) if form.method == COMPRESSED_METHOD else ():
        tensors |= {f"{h.path}.{name}": t.contiguous() for name, t in h.weight.packed().tensors().items()}
    return tensors


def _aside(held: list[Held]) -> list[Held]:
    shared = {h.tied_to for h in held}
    return [h for h in held if h.role == "embedding" and not h.tied_to and h.path not in shared]


def _size(held: Held) -> int:
    return int(math.prod(held.weight.shape) * held.weight.format.bits_per_weight / 8)


def _maker(held: Held, form: SavedForm) -> Callable[[], dict[str, torch.Tensor]]:
    def make() -> dict[str, torch.Tensor]:
        packed = held.weight.packed()
        if form.method == OWN_METHOD:
            prefix = held.path if held.role == "experts" else f"{held.path}.packed_weight"
            return {f"{prefix}.{name}": tensor.contiguous() for name, tensor in packed.tensors().items()}
        if held.role == "experts":
            return _expert_tensors(packed, form.sources[held.path])
        return {f"{held.path}.{name}": tensor for name, tensor in compressed.to_tensors(packed).items()}

    return make


def _expert_tensors(packed: PackedTensor, sources: list[str]) -> dict[str, torch.Tensor]:
    """A fused weight [experts, out, in] as the linears that it was fused from."""
    tensors = {}
    for expert in range(packed.shape[0]):
        whole = packed.expert(expert)
        for part, source in enumerate(sources):
            prefix = source.replace("*", str(expert)).removesuffix("weight")
            named = compressed.to_tensors(whole.shard(0, part, len(sources)))
            tensors.update({prefix + name: tensor for name, tensor in named.items()})
    return tensors
