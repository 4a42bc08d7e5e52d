"""What every `OVModelFor...` shares: a graph, a device, and a folder that both come from.

    model.model                      the openvino.Model; a changed one may be put in its place
    model.to("GPU"), model.compile() where it runs, and making it ready, which the first call does otherwise
    model.save_pretrained(folder)    graph, configuration, and what lay beside them: the tokenizer in both forms
    copy.deepcopy(model)             one with a graph of its own, made ready on its first call
    model.half()                     weights in 16 bits where they had 32

The class is a `PreTrainedModel` without parameters, so that pipelines and `generate` of transformers take it for what it is. Its
tensors of torch lie on the CPU, wherever the graph runs.
"""

from __future__ import annotations

import copy
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
import transformers

from lowbit.contents import CONFIG, GENERATION_CONFIG
from lowbit.errors import CheckpointError, LowbitError, one_line
from lowbit.openvino.export import save_graph
from lowbit.openvino.folders import find_graph, has_source, tell_what_was_done, whole_folder
from lowbit.openvino.library import device as find_device
from lowbit.openvino.library import halved, ov
from lowbit.openvino.opening import compile_model, read_model
from lowbit.openvino.pretrained import FromPretrained

# What a graph's folder holds beside the graph and what transformers writes: copied on to the next folder.
_BESIDE = (
    "tokenizer*", "special_tokens_map.json", "vocab*", "merges.txt", "added_tokens.json", "chat_template*", "spiece.model",
    "preprocessor_config.json", "processor_config.json", "openvino_tokenizer.*", "openvino_detokenizer.*", "openvino_config.json",
)  # fmt: skip
_COMPUTES = "ov_config={'INFERENCE_PRECISION_HINT': ...} names the type that a device computes in"
_NAME_A_DEVICE = 'name one of OpenVINO\'s, such as model.to("GPU")'


class GraphConfig(transformers.PreTrainedConfig):  # type: ignore[misc]  # transformers is not typed
    """The place of a graph among transformers' kinds of models. The configuration that a model has is that of its original."""

    model_type = "openvino_graph"


class OVModel(FromPretrained, transformers.PreTrainedModel):  # type: ignore[misc]  # transformers is not typed
    """A graph of OpenVINO that transformers takes for one of its models."""

    config_class = GraphConfig
    _supports_sdpa = True

    def __init__(
        self,
        model: Any,
        config: Any,
        *,
        device: str | torch.device = "CPU",
        ov_config: Mapping[str, Any] | None = None,
        compile: bool = True,
        folder: str | Path | None = None,
    ) -> None:
        super().__init__(config)
        self._graph, self._compiled = model, None
        self._device_name = device_name(device)
        self.ov_config = dict(ov_config or {})
        # Where pipelines put their tensors: without it they take the first GPU that torch sees, and send the model there.
        self.hf_device_map = {"": "cpu"}
        self.folder = None if folder is None else Path(folder)
        if compile:
            self.compile()

    @property
    def model(self) -> Any:
        """The graph, an `openvino.Model`."""
        return self._graph

    @model.setter
    def model(self, graph: Any) -> None:
        if not isinstance(graph, ov.Model):
            raise LowbitError(f"model.model is an openvino.Model, and {type(graph).__name__} is none")
        self._graph, self._compiled = graph, None

    def __setattr__(self, name: str, value: Any) -> None:
        # torch would take a module for a part of this one, and never ask the property.
        if name == "model":
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    @property
    def graphs(self) -> tuple[Any, ...]:
        """All graphs of the model."""
        return (self._graph,)

    @property
    def compiled(self) -> Any:
        """The graph, ready on its device."""
        if self._compiled is None:
            self._compiled = compile_model(self._to_compile(), self._device_name, self.ov_config)
        return self._compiled

    def compile(self, *_: Any, **__: Any) -> None:
        """Make the graph ready on its device."""
        _ = self.compiled

    def to(self, *places: Any, **named: Any) -> Self:
        """Run on another of OpenVINO's devices from the next call on: "CPU", "GPU", "GPU.1", "NPU", "AUTO:GPU,CPU"."""
        places = (*places, *(named[name] for name in ("device",) if named.get(name) is not None))
        for place in places:
            name = device_name(place)
            if name != self._device_name:
                self._device_name, self._compiled = name, None
        return self

    def clear_requests(self) -> None:
        """Give back what the device holds; the next call makes it ready again."""
        self._compiled = None

    def half(self) -> Self:
        """Weights of 32 bits in 16, in memory and in what `save_pretrained` writes; low-bit ones stay."""
        self.model = halved(self.model)
        return self

    def float(self) -> Self:
        """Itself: what goes in and comes out is float32."""
        warnings.warn(f"float(): does nothing, since a graph takes and gives float32; {_COMPUTES}", stacklevel=2)
        return self

    def bfloat16(self) -> Self:
        """torch's word for a type that graphs are not written in."""
        raise LowbitError(f"bfloat16(): leave it out; {_COMPUTES}")

    def double(self) -> Self:
        """torch's word for a type that graphs are not written in."""
        raise LowbitError(f"double(): leave it out; {_COMPUTES}")

    def cpu(self) -> Self:
        """Run on the CPU."""
        return self.to("CPU")

    def cuda(self, *_: Any, **__: Any) -> Self:
        """torch's word for a device that OpenVINO has not."""
        raise LowbitError(f"cuda(): {_NAME_A_DEVICE}")

    def xpu(self, *_: Any, **__: Any) -> Self:
        """torch's word for Intel's GPUs, which have a name of OpenVINO's."""
        raise LowbitError(f"xpu(): {_NAME_A_DEVICE}")

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        made: Self = copy_graphs(self, memo, shared=("_kept",))
        return made

    @property
    def device(self) -> torch.device:
        """Where tensors go in and come out."""
        return torch.device("cpu")

    @property
    def ov_device(self) -> str:
        """OpenVINO's device."""
        return self._device_name

    @property
    def dtype(self) -> torch.dtype:
        """The type of what comes out."""
        return torch.float32

    def save_pretrained(self, save_directory: str | Path, **_: Any) -> None:
        """Write the graph and everything beside it, readable by `from_pretrained` and by OpenVINO's own tools."""
        target = Path(save_directory).expanduser()
        with whole_folder(target) as folder:
            for name, graph in self._to_save().items():
                save_graph(graph, folder / name)
            self.config.save_pretrained(folder)
            if self.can_generate() and self.generation_config is not None:
                self.generation_config.save_pretrained(folder)
            if self.folder is not None and self.folder.resolve() != target.resolve():
                for pattern in _BESIDE:
                    for file in self.folder.glob(pattern):
                        shutil.copy(file, folder / file.name)
            tell_what_was_done(self._graph, folder)

    def _to_save(self) -> dict[str, Any]:
        """Graphs by the names of their files."""
        return {self.graph_name: self._graph}

    @classmethod
    def _find(cls, model_id: str | Path, keywords: Mapping[str, Any]) -> Path | None:
        return find_graph(model_id, keywords, cls.graph_name)

    @classmethod
    def _has_source(cls, folder: Path) -> bool:
        return has_source(folder)

    @classmethod
    def _looked_for(cls, folder: Path) -> tuple[Path, str]:
        return folder, cls.graph_name

    def _to_compile(self) -> Any:
        """The graph as it is compiled, where that differs from the one that is saved."""
        return self._graph

    @classmethod
    def _check_head(cls, folder: Path, config: Any) -> None:
        """A graph has one head, whatever class opens it. What no class of transformers is called by says nothing."""

    @classmethod
    def _open(cls, folder: Path, config: Any = None, trust_remote_code: bool = False, **keywords: Any) -> Self:
        """The model of a folder that holds a graph."""
        if not (folder / CONFIG).is_file():
            raise CheckpointError(
                f"{folder} has no {CONFIG}: copy the one of the original model beside {cls.graph_name}"
            )
        if config is None:
            try:
                config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
            except (OSError, ValueError) as error:
                raise CheckpointError(f"{folder / CONFIG} cannot be read: {one_line(str(error))}") from error
        cls._check_head(folder, config)
        made = cls(read_model(folder, cls.graph_name), config, folder=folder, **keywords)
        if made.can_generate() and (folder / GENERATION_CONFIG).is_file():
            made.generation_config = transformers.GenerationConfig.from_pretrained(folder)
        return made


def copy_graphs(held: Any, memo: dict[int, Any], shared: tuple[str, ...] = ()) -> Any:
    """A copy with graphs of its own, ready on no device yet; `shared` names what both have in common."""
    made = object.__new__(type(held))
    memo[id(held)] = made
    fields = dict.fromkeys(("_compiled", "compiled_graph")) | {name: getattr(held, name) for name in shared}
    made.__dict__.update(
        {name: fields[name] if name in fields else copy.deepcopy(value, memo) for name, value in vars(held).items()}
    )
    return made


def check_tokens(tokens: Any, words: int) -> None:
    """Refuse what is no token: the graph reads some row or other of its table for it."""
    odd = tokens[(tokens < 0) | (tokens >= words)]
    if odd.size:
        raise LowbitError(
            f"token {int(odd[0])} is none of the vocabulary, which has 0 to {words - 1}: is the tokenizer this model's?"
        )


def device_name(place: Any) -> str:
    """A device as OpenVINO spells it; a torch device of the CPU is that."""
    if isinstance(place, torch.dtype):
        raise LowbitError(f"to({place}): leave it out; {_COMPUTES}")
    if isinstance(place, torch.device) and place.type != "cpu":
        raise LowbitError(f"{place} is a device of torch: {_NAME_A_DEVICE}")
    return find_device(str(place))
