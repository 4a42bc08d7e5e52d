"""A saved model as the engine needs it: its config, its tokenizer, and its weights one after another.

    files = open_files(folder or .gguf)
    for loaded in read_weights(files, spec, recipe): ...      # role, layer, weight, bias; pages given back behind it

A folder holds plain weights, compressed-tensors' packed ones, or lowbit's own form; a GGUF file holds blocks. All
become `Dense` or `PackedTensor` over numpy. With a recipe plain weights are rounded as they come, so that a model of
any size is made low-bit with room for one weight.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from lowbit.contents import (
    CONFIG,
    gguf_in,
    is_gguf,
    missing,
    quantization_config,
    read_config,
    read_generation_config,
    read_json,
    read_text,
    weight_files,
)
from lowbit.core import calls
from lowbit.errors import CheckpointError, RecipeError, understood
from lowbit.formats import Format
from lowbit.models.families import spec_from_config
from lowbit.models.spec import DecoderSpec, Located
from lowbit.packing import PackedTensor
from lowbit.progress import progress
from lowbit.recipe import Recipe
from lowbit.runtime.mapped import MappedFile
from lowbit.runtime.packed_names import PackedIndex
from lowbit.runtime.stored import DENSE_TYPES, Dense, Weight, dequantize, join_rows, quantize_dense, stack
from lowbit.runtime.text import Tokenizer
from lowbit.search import SEARCHES, Search

# The number of a layer in a name: model.layers.[5].mlp
_LAYER = re.compile(r"(.*?\.)(\d+)\.")
# Tables that older files hold beside the weights, and that models make themselves.
_MASK = re.compile(r"\.(inv_freq|masked_bias|(attn|attention)\.bias)$")
# Roles that a recipe packs, and what it calls them; routers, positions and vectors stay as they are.
RECIPE_ROLES = {
    **dict.fromkeys(("q", "k", "v", "qkv", "o", "gate", "up", "down", "gate_up", "embedding_in", "head_in"), "linear"),
    **dict.fromkeys(("shared_gate", "shared_up", "shared_down"), "linear"),
    **dict.fromkeys(("experts_gate_up", "experts_down"), "experts"),
    "embedding": "embedding",
    "head": "head",
}


class ModelFiles(Protocol):
    """What a folder and a GGUF file have in common. Names are those of dense weights, in Hugging Face's spelling."""

    path: Path
    notes: list[str]

    @property
    def config(self) -> dict[str, Any]: ...
    @property
    def generation_config(self) -> dict[str, Any]: ...
    @property
    def names(self) -> Collection[str]: ...
    @property
    def is_packed(self) -> bool: ...
    @property
    def formats(self) -> set[Format]:
        """The formats of packed weights."""
        ...

    def tokenizer(self) -> Tokenizer | None: ...
    def check(self) -> None:
        """Raise if a file was cut off since it was opened."""
        ...

    def read(self, name: str, columns: int, is_embedding: bool = False) -> Weight:
        """One weight, [out, columns] or a vector; where it is packed `columns` says how many inputs it has."""
        ...

    def release(self, name: str) -> None:
        """Give back the memory of a weight that has been read."""
        ...


@dataclass(frozen=True)
class Loaded:
    """One weight of the model, whole: [.., out, in], a vector, or experts along a first axis; and its bias."""

    role: str
    layer: int | None
    weight: Weight
    bias: Dense | None = None


def open_files(path: str | Path) -> ModelFiles:
    """A model folder or a GGUF file."""
    path = Path(path).expanduser()
    gguf = gguf_in(path) if path.is_dir() else path if path.is_file() and is_gguf(path) else None
    if gguf is None:
        return FolderFiles(path)
    from lowbit.runtime.gguf_files import GgufFiles  # 16 ms of tables, which folders do not need

    return GgufFiles(gguf)


class FolderFiles:
    """A Hugging Face folder: plain, compressed-tensors or lowbit's own form."""

    def __init__(self, path: Path) -> None:
        if not path.is_dir():
            raise CheckpointError(f"{path} is no model folder and no .gguf file" if path.exists() else missing(path))
        self.path = path
        self.notes: list[str] = []
        stored = read_config(path)
        self.tensors = {n: t for file in weight_files(path) for n, t in MappedFile(file).tensors.items()}
        quantization = quantization_config(stored)
        stored.pop("quantization_config", None)
        with understood(_odd(path)):
            self.packed = PackedIndex(self.tensors, quantization, spec_from_config(stored).names_in_files)
        self.config = stored | ({"tie_word_embeddings": True} if self.packed.tied else {})
        self.generation_config = read_generation_config(path)
        self.names = self.packed.names

    @property
    def is_packed(self) -> bool:
        return bool(self.packed.paths)

    @property
    def formats(self) -> set[Format]:
        with understood(_odd(self.path)):
            return self.packed.formats

    def check(self) -> None:
        for file in {tensor.file for tensor in self.tensors.values()}:
            file.check()

    def tokenizer(self) -> Tokenizer | None:
        return read_tokenizer(self.path)

    def read(self, name: str, columns: int, is_embedding: bool = False) -> Weight:
        if name in self.packed.paths:
            with understood(_odd(self.path)):
                return self.packed.read(name, columns, is_embedding)
        tensor = self.tensors[name]
        if tensor.dtype not in DENSE_TYPES:
            raise CheckpointError(
                f"{name} is stored as {tensor.dtype}, which the engine does not read: load the model through "
                "lowbit.AutoModelForCausalLM and save it with save_low_bit first"
            )
        return Dense(tensor.view(), DENSE_TYPES[tensor.dtype])

    def release(self, name: str) -> None:
        parts = self.packed.parts(name).values() if name in self.packed.paths else [self.tensors[name]]
        for tensor in parts:
            tensor.release()


def read_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer of a model folder, or None without a tokenizer.json."""
    file = folder / "tokenizer.json"
    if not file.exists():
        return None
    config_file, template_file = folder / "tokenizer_config.json", folder / "chat_template.jinja"
    config = read_json(config_file) if config_file.exists() else {}
    template = read_text(template_file) if template_file.exists() else None
    return Tokenizer.from_json(read_text(file), config, template)


def read_spec(files: ModelFiles) -> DecoderSpec:
    """What the model is."""
    with understood(_odd(files.path)):
        return spec_from_config(files.config)


def _odd(path: Path) -> str:
    return f"{path}: its {CONFIG} cannot be understood"


def read_weights(files: ModelFiles, spec: DecoderSpec, recipe: Recipe | None = None) -> Iterator[Loaded]:
    """Every weight of the model in turn. A weight's arrays may be views of the file: they are good until the next is
    asked for."""
    if recipe is not None and files.is_packed:
        raise RecipeError(
            f"{files.path} is low-bit already: make it low-bit anew from the original model, or leave out the format"
        )
    search = None if recipe is None else search_of(recipe)
    places = spec.locate(files.names)
    _account_for_rest(files, spec, {name for place in places.values() for name in place.all_names})
    with progress("packing" if recipe else "loading", len(places)) as advance:
        for (role, layer), located in places.items():
            weight = _assemble(files, located)
            if recipe is not None and search is not None and role in RECIPE_ROLES:
                weight = _round(weight, _formats(recipe, located, spec), search)
            yield Loaded(role, layer, weight, _bias(files, located.bias))
            for name in (name for names in located.names for name in names):
                files.release(name)
            advance("")


def search_of(recipe: Recipe) -> Search:
    """How a recipe has weights rounded while a model loads, without torch; algorithms that need more are refused."""
    needs = "rounds in torch, which is not there while a model loads"
    if recipe.asks_for_data:
        needs = "looks at activations, which there are none of while a model loads"
    elif recipe.rounder in SEARCHES:
        return SEARCHES[recipe.rounder]
    raise RecipeError(f"{recipe.scaler or recipe.rounder} {needs}: make the model low-bit with 'lowbit quantize' first")


def _bias(files: ModelFiles, name: str | None) -> Dense | None:
    if name is None:
        return None
    stored = files.read(name, 0)
    return Dense(stored.float32() if isinstance(stored, Dense) else dequantize(stored).array, "float32")


def _account_for_rest(files: ModelFiles, spec: DecoderSpec, used: Collection[str]) -> None:
    """A file with more layers than the config says is of another model; layers that guess further tokens may follow.

    Other tensors of layers, and biases, without a place are noted: the config denies them, and one of the two is wrong.
    """
    count = len(spec.layers) + int(files.config.get("num_nextn_predict_layers") or 0)
    stems = {found[1] for name in used if (found := _LAYER.match(name))}
    rest = sorted(name for name in set(files.names) - set(used) if not _MASK.search(name))
    numbers = {name: int(found[2]) for name in rest if (found := _LAYER.match(name)) and found[1] in stems}
    left = [name for name, number in numbers.items() if number >= count]
    if left:
        raise CheckpointError(
            f"{files.path} holds {len(left)} tensors of layers beyond the {len(spec.layers)} of its {CONFIG} "
            f"({left[0]} ...): the weights and the configuration are not of the same model"
        )
    biases = {f"{name.removesuffix('weight')}bias" for name in used}
    idle = [name for name in rest if name in biases or numbers.get(name, count) < len(spec.layers)]
    if idle:
        files.notes.append(f"{len(idle)} tensors have no place in the model that {CONFIG} describes ({idle[0]} ...)")


def _assemble(files: ModelFiles, located: Located) -> Weight:
    """One weight from its pieces, [.., out, in], checked against the spec."""
    spec = located.weight
    columns, is_embedding = spec.shape[-1], spec.role == "embedding"
    rows = [join_rows([files.read(name, columns, is_embedding) for name in names]) for names in located.names]
    weight = stack(rows) if located.in_pieces else rows[0]
    if spec.transposed and isinstance(weight, Dense):
        weight = weight.transposed()
    if tuple(weight.shape) != tuple(spec.shape):
        raise CheckpointError(
            f"{located.names[0][0]} has the shape {list(weight.shape)}, and by config.json the {spec.role} weight of "
            f"this model has {list(spec.shape)}: the two do not belong together"
        )
    return weight


def _formats(recipe: Recipe, located: Located, spec: DecoderSpec) -> tuple[Format, ...]:
    """What a recipe makes of a weight; a tied embedding is the head, and has its format."""
    role = RECIPE_ROLES[located.weight.role]
    path = located.weight.name.format(layer=located.layer).removesuffix(".weight")
    choice = recipe.choose(path, "head" if role == "embedding" and spec.head.tied else role)
    for format in choice.formats:
        refusal = calls.refuses(format, (1, 1)) or calls.refuses_to_quantize(format)
        if refusal:
            raise RecipeError(f"the engine cannot make {format}: {refusal}")
    return choice.formats


def _round(weight: Weight, formats: tuple[Format, ...], search: Search) -> Weight:
    """A weight in the format, of those offered, that keeps it best; as it is when none is."""
    if not formats:
        return weight
    numbers = dequantize(weight) if isinstance(weight, PackedTensor) else weight
    offers = [quantize_dense(numbers, format, search) for format in formats]
    return offers[0] if len(offers) == 1 else min(offers, key=lambda packed: _error(numbers, packed))


def _error(numbers: Dense, packed: PackedTensor) -> float:
    return float(np.square(numbers.float32() - dequantize(packed).array).sum())
