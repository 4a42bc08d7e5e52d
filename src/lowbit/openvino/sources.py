"""Where the weights of a decoder come from: anything that lowbit reads, as `ModelFiles`, so that codes arrive unrounded.

a folder           plain, compressed-tensors or lowbit's own form           read from the map, weight after weight
a .gguf file       blocks                                                   the same
a folder of GPTQ or AWQ (AutoRound's too)                                   the same
a model in memory  its packed weights as they are, its dense ones
anything else      a name on the hub, an old save: loaded by AutoModelForCausalLM, then a model in memory
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np

from lowbit.contents import CONFIG, quantization_config, read_config, read_generation_config, weight_files
from lowbit.core import calls
from lowbit.errors import CheckpointError
from lowbit.formats import Format
from lowbit.methods import COMPRESSED_METHOD, OWN_METHOD
from lowbit.models.families import FAMILIES, TEXT_PARTS
from lowbit.openvino.constants import array_of
from lowbit.packing import PackedTensor
from lowbit.recipe import Recipe
from lowbit.runtime.files import ModelFiles, open_files, read_tokenizer
from lowbit.runtime.mapped import MappedFile
from lowbit.runtime.stored import DENSE_TYPES, Dense, Weight
from lowbit.runtime.text import Tokenizer

_READ_BY_THE_ENGINE = (None, OWN_METHOD, COMPRESSED_METHOD)
_TORCH_TYPES = {"torch.float32": "float32", "torch.float16": "float16", "torch.bfloat16": "bfloat16"}
_CODES = ".qweight"
_OTHER_HEAD = re.compile(
    r"For(SequenceClassification|TokenClassification|QuestionAnswering|MaskedLM|ImageClassification|AudioClassification|CTC)$"
)


def open_source(source: Any) -> ModelFiles:
    """The weights of a folder, a file, a name on the hub, or a transformers model."""
    if not isinstance(source, str | Path):
        return cast(ModelFiles, HeldModel(source))
    path = Path(source).expanduser()
    if path.is_file():
        return open_files(path)
    if not path.is_dir():
        return cast(ModelFiles, HeldModel(load_model(str(source))))
    method = None
    if (path / CONFIG).is_file():
        method = (quantization_config(read_config(path)) or {}).get("quant_method")
    if method in _READ_BY_THE_ENGINE:
        return open_files(path)
    from lowbit.checkpoint.ready_made import METHODS

    if method in METHODS:
        return cast(ModelFiles, ReadyMadeFiles(path))
    return cast(ModelFiles, HeldModel(load_model(str(path))))


def has_spec(source: Any, keywords: Mapping[str, Any] | None = None) -> bool:
    """Whether lowbit knows what a model is, and writes its graph itself; a graph of any other is followed."""
    if not isinstance(source, str | Path):
        return source.config.model_type in (*FAMILIES, *TEXT_PARTS)
    path = Path(source).expanduser()
    if not path.exists():
        from lowbit.checkpoint.hub import find_model  # the hub's client, which files here do not need

        path = find_model(source, keywords or {}).path
    if not (path / CONFIG).is_file():
        return True  # a .gguf file, or what is wrong with the folder is said by who reads it
    return read_config(path).get("model_type") in (*FAMILIES, *TEXT_PARTS)


def check_generates(source: Any) -> None:
    """Say what a folder is whose model has another task, before its trace as a language model goes wrong."""
    path = Path(source).expanduser() if isinstance(source, str | Path) else None
    if path is None or not (path / CONFIG).is_file():
        return
    fields = read_config(path)
    name = str((fields.get("architectures") or [""])[0])
    head = _OTHER_HEAD.search(name)
    found = f"OVModel{head.group()}" if head else ""
    if fields.get("is_encoder_decoder") and fields.get("model_type") not in (*FAMILIES, *TEXT_PARTS):
        found = "OVModelForSpeechSeq2Seq" if fields.get("model_type") == "whisper" else "OVModelForSeq2SeqLM"
    if found:
        raise CheckpointError(
            f"{path} holds a {name}, which is no decoder: lowbit.openvino.{found}.from_pretrained(..., export=True) writes it, "
            f"or: python -m lowbit.compat optimum-cli export openvino --model {path} OUT"
        )


def needs_torch(recipe: Recipe) -> bool:
    """Whether a recipe asks for a format that the core does not round to."""
    offered = [recipe.linear, recipe.head, recipe.embedding, *recipe.alternatives, *(f for _, f in recipe.overrides)]
    return any(format is not None and calls.refuses_to_quantize(format) for format in offered)


def rounded(source: Any, recipe: Recipe) -> ModelFiles:
    """A model made low-bit in memory."""
    from lowbit.optimize import optimize_model

    model = load_model(str(source)) if isinstance(source, str | Path) else source
    return cast(ModelFiles, HeldModel(optimize_model(model, recipe=recipe)))


def load_model(name: str) -> Any:
    from lowbit.checkpoint.auto import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(name)


class HeldModel:
    """A transformers model in memory, dense or low-bit, as if it were read from files."""

    def __init__(self, model: Any) -> None:
        from lowbit.bridge.weights import held_weights
        from lowbit.checkpoint.save import source_folder

        self.notes: list[str] = []
        self.path = source_folder(model) or Path(str(model.config._name_or_path or "model"))
        self._held = held_weights(model)
        self._dense = dict(model.named_parameters(remove_duplicate=False))
        self.config: dict[str, Any] = model.config.to_dict()
        self.config.pop("quantization_config", None)
        self.config.setdefault("architectures", [type(model).__name__])
        generation = getattr(model, "generation_config", None)
        self.generation_config: dict[str, Any] = {} if generation is None else generation.to_diff_dict()

    @property
    def names(self) -> Collection[str]:
        return {*self._held, *self._dense}

    @property
    def is_packed(self) -> bool:
        return bool(self._held)

    @property
    def formats(self) -> set[Format]:
        return {held.format for held in self._held.values()}

    def tokenizer(self) -> Tokenizer | None:
        return None

    def check(self) -> None:
        """Memory is not cut off."""

    def read(self, name: str, columns: int, is_embedding: bool = False) -> Weight:
        held = self._held.get(name)
        if held is not None:
            packed = held.packed()
            return packed.with_tensors({part: array_of(tensor) for part, tensor in packed.tensors().items()})
        tensor = self._dense[name]
        kind = _TORCH_TYPES.get(str(tensor.dtype))
        if kind is None or tensor.device.type != "cpu":
            raise CheckpointError(
                f"{name} is {tensor.dtype} on {tensor.device}: bring the model to the CPU in a plain type first"
            )
        return Dense(np.ascontiguousarray(array_of(tensor)), kind)

    def release(self, name: str) -> None:
        """The model is the caller's, and stays."""


class ReadyMadeFiles:
    """A folder of GPTQ or AWQ, whose codes are brought into our order one linear after another."""

    is_packed = True
    formats: set[Format] = set()

    def __init__(self, path: Path) -> None:
        from lowbit.checkpoint.ready_made import Packing

        self.path = path
        self.notes: list[str] = []
        stored = read_config(path)
        self._packing = Packing.of(quantization_config(stored) or {})
        stored.pop("quantization_config", None)
        self.config = stored
        self.generation_config = read_generation_config(path)
        self._tensors = {n: t for file in weight_files(path) for n, t in MappedFile(file).tensors.items()}
        self._packed = {name.removesuffix(_CODES) for name in self._tensors if name.endswith(_CODES)}

    @cached_property
    def names(self) -> Collection[str]:
        parts = {
            name for name in self._tensors if name.rpartition(".")[0] in self._packed and not name.endswith(".bias")
        }
        return {*self._tensors, *(f"{path}.weight" for path in self._packed)} - parts

    def tokenizer(self) -> Tokenizer | None:
        return read_tokenizer(self.path)

    def check(self) -> None:
        for file in {tensor.file for tensor in self._tensors.values()}:
            file.check()

    def read(self, name: str, columns: int, is_embedding: bool = False) -> Weight:
        path = name.removesuffix(".weight")
        if path in self._packed and name.endswith(".weight"):
            return self._read_packed(path, columns)
        tensor = self._tensors[name]
        if tensor.dtype not in DENSE_TYPES:
            raise CheckpointError(
                f"{name} is stored as {tensor.dtype}, and its codes are not there: copy the folder again"
            )
        return Dense(tensor.view(), DENSE_TYPES[tensor.dtype])

    def _read_packed(self, path: str, columns: int) -> PackedTensor:
        import torch  # the readers of these forms are written in it

        from lowbit.checkpoint.ready_made import read_parts

        parts = {
            word: torch.from_numpy(self._tensors[name].view().copy())
            for name in self._tensors
            if (word := name.rpartition(".")[2]) != "bias" and name.rpartition(".")[0] == path
        }
        if "scales" not in parts:
            raise CheckpointError(f"{path}: the checkpoint lacks its scales; is a shard of it missing?")
        packed = read_parts(path, parts, (int(parts["scales"].shape[-1]), columns), self._packing)
        return packed.with_tensors({part: array_of(tensor) for part, tensor in packed.tensors().items()})

    def release(self, name: str) -> None:
        path = name.removesuffix(".weight")
        for part in [part for part in self._tensors if part == name or part.rpartition(".")[0] == path]:
            self._tensors[part].release()
