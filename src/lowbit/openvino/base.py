"""What every `OVModelFor...` shares: a graph, a device, and a folder that both come from.

    model.model                      the openvino.Model; a changed one may be put in its place
    model.to("GPU"), model.compile() where it runs, and making it ready, which the first call does otherwise
    model.save_pretrained(folder)    graph, configuration, and what lay beside them: the tokenizer in both forms

The class is a `PreTrainedModel` without parameters, so that pipelines and `generate` of transformers take it for what it is. Its
tensors of torch lie on the CPU, wherever the graph runs.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
import transformers

from lowbit.checkpoint.companions import travels
from lowbit.checkpoint.hub import fetch_companions, find_model
from lowbit.contents import CONFIG, GENERATION_CONFIG
from lowbit.errors import CheckpointError, LowbitError
from lowbit.openvino.compress import compression_report, is_compressed
from lowbit.openvino.export import FORMATS, RECIPE, save_graph, write_ov_config
from lowbit.openvino.library import device as find_device
from lowbit.openvino.library import ov
from lowbit.openvino.opening import MODEL, compile_model, has_graph, read_model

# What a graph's folder holds beside the graph and what transformers writes: copied on to the next folder.
_BESIDE = (
    "tokenizer*", "special_tokens_map.json", "vocab*", "merges.txt", "added_tokens.json", "chat_template*", "spiece.model",
    "preprocessor_config.json", "processor_config.json", "openvino_tokenizer.*", "openvino_detokenizer.*", "openvino_config.json",
)  # fmt: skip


# What a folder is exported from: weights in one file, or in several with an index.
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")

# Words of optimum-intel: the class is the task, every graph takes inputs of any size, and nothing is copied twice.
_IDLE = ("task", "use_io_binding", "dynamic_shapes")


class OVModel(transformers.PreTrainedModel):  # type: ignore[misc]  # transformers is not typed
    """A graph of OpenVINO that transformers takes for one of its models."""

    config_class = transformers.PreTrainedConfig
    _supports_sdpa = True
    # The file of the graph.
    graph_name: ClassVar[str] = MODEL

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
        self._device_name = _device_name(device)
        self.ov_config = dict(ov_config or {})
        # Where pipelines put their tensors: without it they take the first GPU that torch sees, and send the model there.
        self.hf_device_map = {"": "cpu"}
        self.folder = None if folder is None else Path(folder)
        # What the graph was written to by `from_pretrained(export=True)`: it is read from there as long as the model lives.
        self._kept: tempfile.TemporaryDirectory[str] | None = None
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
            if isinstance(place, torch.dtype):
                raise LowbitError(
                    f"a graph computes in the type that its device is asked for: ov_config={{'INFERENCE_PRECISION_HINT': ...}} "
                    f"takes the place of to({place})"
                )
            name = _device_name(place)
            if name != self._device_name:
                self._device_name, self._compiled = name, None
        return self

    def reshape(self, *_: Any, **__: Any) -> None:
        """optimum-intel's word for fixing sizes."""
        raise LowbitError(
            "the graph takes inputs of any size, so leave reshape out: where a device needs fixed ones, set them with "
            "compile=False and model.model.reshape(...), which is OpenVINO's own, before the first call"
        )

    def clear_requests(self) -> None:
        """Give back what the device holds; the next call makes it ready again."""
        self._compiled = None

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
        folder = make_folder(save_directory)
        replace_graph(self._graph, folder / self.graph_name)
        self.config.save_pretrained(folder)
        if self.can_generate() and self.generation_config is not None:
            self.generation_config.save_pretrained(folder)
        if self.folder is not None and self.folder.resolve() != folder.resolve():
            for pattern in _BESIDE:
                for file in self.folder.glob(pattern):
                    shutil.copy(file, folder / file.name)
        tell_what_was_done(self._graph, folder)

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
            config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        cls._check_head(folder, config)
        made = cls(read_model(folder, cls.graph_name), config, folder=folder, **keywords)
        if made.can_generate() and (folder / GENERATION_CONFIG).is_file():
            made.generation_config = transformers.GenerationConfig.from_pretrained(folder)
        return made


def find_graph(model_id: str | Path, keywords: Mapping[str, Any], name: str = MODEL) -> Path | None:
    """The folder of a graph, here or fetched from the hub; None where the model has to be exported first."""
    path = Path(model_id).expanduser()
    if path.exists():
        return path if has_graph(path, name) else None
    found = find_model(model_id, keywords)
    if found.files is not None and name in found.files:
        fetch_companions(str(model_id), found.path, _belongs_to_a_graph)
    return found.path if has_graph(found.path, name) else None


def is_exported_again(folder: Path, export: bool | None) -> bool:
    """Whether a folder with a graph is to be exported all the same: asked for, and the original's weights lie beside it."""
    return bool(export) and any((folder / name).is_file() for name in _WEIGHTS)


def _belongs_to_a_graph(file: str) -> bool:
    return file.startswith("openvino_") or file == GENERATION_CONFIG or travels(file)


def replace_graph(model: Any, path: Path) -> None:
    """Write a graph's two files. It may be reading its weights from the very files that it replaces."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".writing") as beside:
        save_graph(model, Path(beside) / path.name)
        for written in Path(beside).iterdir():
            written.replace(path.parent / written.name)


def drop_idle(keywords: dict[str, Any]) -> None:
    """Take away what optimum-intel's from_pretrained takes and a class here needs not be told."""
    idle = [name for name in _IDLE if keywords.pop(name, None) is not None]
    if idle:
        warnings.warn(f"{', '.join(idle)}: does nothing here and may be left out", stacklevel=3)


def make_folder(place: str | Path) -> Path:
    """A folder to write into, made where it is not there."""
    folder = Path(place).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be a folder ({error.strerror}): name another to write into") from error
    return folder


def tell_what_was_done(graph: Any, folder: Path) -> None:
    """Write into a folder what its graph says of its weights: how they were written, and what `compress_weights` did since."""
    if not graph.has_rt_info(RECIPE) and not is_compressed(graph):
        return
    recipe, formats = "", Counter[str]()
    if graph.has_rt_info(RECIPE):
        recipe = graph.get_rt_info(RECIPE).astype(str)
        formats.update(json.loads(graph.get_rt_info(FORMATS).astype(str)))
    if is_compressed(graph):
        report = compression_report(graph)
        recipe = report.recipe
        formats.update(report.formats())
    write_ov_config(folder, recipe, formats)


def _device_name(place: Any) -> str:
    """A device as OpenVINO spells it; a torch device of the CPU is that."""
    if isinstance(place, torch.device) and place.type != "cpu":
        raise LowbitError(f'{place} is a device of torch: name one of OpenVINO\'s, such as model.to("GPU")')
    return find_device(str(place))
