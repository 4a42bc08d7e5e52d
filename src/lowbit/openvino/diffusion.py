"""Pictures from text: the U-Net, text encoders and autoencoder of a diffusers pipeline as graphs, its own code around them.

    pipeline = OVStableDiffusionPipeline.from_pretrained("folder or model", export=True, load_in_8bit=True)
    pipeline("a cat on the moon", num_inference_steps=20).images[0]

The pipeline is diffusers' class with our parts in the places of its modules, so schedulers, guidance, callbacks and generators are
all its own; what is neither a U-Net, a text encoder nor an autoencoder (a safety checker, say) stays a module of torch. The folder
keeps the layout of diffusers, with `openvino_model.xml` in each part's folder and the autoencoder's halves in two.
"""

from __future__ import annotations

import importlib
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, Self

import numpy as np
import torch
import transformers
from torch import nn

from lowbit.errors import CheckpointError, LowbitError, MissingPackageError, RecipeError, one_line
from lowbit.openvino.base import make_folder, replace_graph
from lowbit.openvino.configs import OVWeightQuantizationConfig, Quantization
from lowbit.openvino.exporting import compress, quantization_asked
from lowbit.openvino.library import device as find_device
from lowbit.openvino.library import ov
from lowbit.openvino.opening import MODEL, compile_model, has_graph, read_model
from lowbit.openvino.picture_parts import trace_text, trace_unet, trace_vae

try:
    import diffusers
    from diffusers.configuration_utils import FrozenDict
    from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
    from diffusers.models.modeling_outputs import AutoencoderKLOutput
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
except ModuleNotFoundError as error:
    if error.name is None or error.name.partition(".")[0] != "diffusers":
        raise
    raise MissingPackageError("diffusers", "a pipeline that makes pictures", "diffusion") from error

INDEX = "model_index.json"
CONFIG = "config.json"
_TEXT_PARTS = ("text_encoder", "text_encoder_2")
_VAE_PARTS = ("vae_encoder", "vae_decoder")


class Part(nn.Module):
    """A graph in the place of a module of a pipeline: `model` is an `openvino.Model` that may be exchanged."""

    def __init__(self, graph: Any, config: Any, pipeline: OVDiffusionPipeline) -> None:
        super().__init__()
        self.graph, self.compiled_graph, self.config = graph, None, config
        self.pipeline: Any = SimpleNamespace(of=pipeline)  # no module of this module

    @property
    def model(self) -> Any:
        return self.graph

    @model.setter
    def model(self, graph: Any) -> None:
        self.graph, self.compiled_graph = graph, None

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    def to(self, *_: Any, **__: Any) -> Self:
        """Tensors go in and come out on the CPU; the pipeline's `to` names the device of the graphs."""
        return self

    def run(self, **given: Any) -> dict[str, torch.Tensor]:
        """What the graph gives, by name."""
        if self.compiled_graph is None:
            owner = self.pipeline.of
            self.compiled_graph = compile_model(self.graph, owner.ov_device, owner.ov_config)
        named = {port.get_any_name(): port.get_element_type().to_dtype() for port in self.graph.inputs}
        arrays = {name: np.asarray(given[name]).astype(kind, copy=False) for name, kind in named.items()}
        found: Any = self.compiled_graph
        answer = found(arrays)
        return {port.get_any_name(): torch.from_numpy(answer[port].copy()) for port in found.outputs}


class UNet(Part):
    @property
    def add_embedding(self) -> Any:
        """SDXL asks how wide its further conditions are."""
        return SimpleNamespace(linear_1=SimpleNamespace(in_features=self.config.projection_class_embeddings_input_dim))

    def forward(
        self,
        sample: torch.Tensor,
        timestep: Any,
        encoder_hidden_states: torch.Tensor,
        added_cond_kwargs: Mapping[str, torch.Tensor] | None = None,
        timestep_cond: Any = None,
        cross_attention_kwargs: Any = None,
        return_dict: bool = True,
    ) -> Any:
        if timestep_cond is not None or cross_attention_kwargs:
            raise LowbitError(
                "the graph of this U-Net takes no timestep_cond and no cross_attention_kwargs: leave them out"
            )
        given = {"sample": sample, "timestep": float(timestep), "encoder_hidden_states": encoder_hidden_states}
        found = self.run(**given, **(added_cond_kwargs or {}))["out_sample"]
        return UNet2DConditionOutput(sample=found) if return_dict else (found,)


class TextEncoder(Part):
    def forward(
        self, input_ids: torch.Tensor, attention_mask: Any = None, output_hidden_states: bool = False, **_: Any
    ) -> Any:
        found = self.run(input_ids=input_ids)
        layers = [name for name in found if name.startswith("hidden_states.")]
        hidden = tuple(found.pop(name) for name in layers)
        kind = transformers.modeling_outputs.BaseModelOutputWithPooling
        if "text_embeds" in found:
            kind = transformers.models.clip.modeling_clip.CLIPTextModelOutput
        return kind(**found, hidden_states=hidden if output_hidden_states else None)


class Autoencoder(nn.Module):
    """Both halves of the autoencoder, as one module of the pipeline."""

    def __init__(self, encoder: Part, decoder: Part) -> None:
        super().__init__()
        self.encoder, self.decoder, self.config = encoder, decoder, decoder.config

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    def to(self, *_: Any, **__: Any) -> Self:
        """As of the other parts."""
        return self

    def decode(self, z: torch.Tensor, return_dict: bool = True, generator: Any = None) -> Any:
        found = self.decoder.run(latent_sample=z)["sample"]
        return DecoderOutput(sample=found) if return_dict else (found,)

    def encode(self, x: torch.Tensor, return_dict: bool = True) -> Any:
        latents = DiagonalGaussianDistribution(self.encoder.run(sample=x)["latent_parameters"])
        return AutoencoderKLOutput(latent_dist=latents) if return_dict else (latents,)


class OVDiffusionPipeline:
    """A pipeline of diffusers over graphs; what it has, this has."""

    pipeline_class: ClassVar[str] = ""  # of the folder itself

    def __init__(self, folder: Path, device: str = "CPU", ov_config: Mapping[str, Any] | None = None) -> None:
        self.ov_device, self.ov_config = find_device(device), dict(ov_config or {})
        self._kept: tempfile.TemporaryDirectory[str] | None = None
        index = self.index = json.loads((folder / INDEX).read_text())
        kind = getattr(diffusers, self.pipeline_class or index["_class_name"])
        self.parts = {name: self._read(folder / name, index) for name in _graph_parts(folder)}
        taken: dict[str, Any] = {n: part for n, part in self.parts.items() if n not in _VAE_PARTS}
        taken["vae"] = Autoencoder(self.parts["vae_encoder"], self.parts["vae_decoder"])
        for name, said in index.items():
            if isinstance(said, list) and name not in taken:
                taken[name] = _load(folder / name, *said)
            elif not isinstance(said, list) and not name.startswith("_"):
                taken[name] = said
        self.pipeline = kind(**taken)

    @classmethod
    def from_pretrained(
        cls,
        model_id: str | Path,
        *,
        export: bool | None = None,
        load_in_8bit: bool | None = None,
        load_in_4bit: bool | None = None,
        quantization_config: Any = None,
        device: str = "CPU",
        ov_config: Mapping[str, Any] | None = None,
        compile: bool = True,
        **keywords: Any,
    ) -> Self:
        """A pipeline from a folder of graphs, or from any of diffusers' folders or names, which is exported first."""
        asked = quantization_asked(load_in_8bit, load_in_4bit, quantization_config)
        if asked is not None and not isinstance(asked, OVWeightQuantizationConfig):
            raise RecipeError(f"{type(asked).__name__} quantises language models: take OVWeightQuantizationConfig here")
        source = Path(model_id).expanduser()
        if _graph_parts(source):
            made = cls(source, device, ov_config)
            if asked is not None:
                for part in made.parts.values():
                    part.model = compress(part.model, asked, source)
        else:
            kept = tempfile.TemporaryDirectory(prefix="lowbit-openvino-")
            export_pipeline(model_id, Path(kept.name), asked, keywords)
            made = cls(Path(kept.name), device, ov_config)
            made._kept = kept
        if compile:
            made.compile()
        return made

    def __call__(self, *values: Any, **named: Any) -> Any:
        """Make pictures: diffusers' own call."""
        if named.get("clip_skip") is not None:
            raise LowbitError("clip_skip reads inside of the text encoder, which is a graph: leave it out")
        return self.pipeline(*values, **named)

    def __getattr__(self, name: str) -> Any:
        if name == "pipeline":
            raise AttributeError(name)
        return getattr(self.pipeline, name)

    @property
    def scheduler(self) -> Any:
        return self.pipeline.scheduler

    @scheduler.setter
    def scheduler(self, scheduler: Any) -> None:
        self.pipeline.scheduler = scheduler

    def to(self, device: str) -> Self:
        """Run the graphs on another of OpenVINO's devices from the next call on."""
        self.ov_device = find_device(str(device))
        for part in self.parts.values():
            part.compiled_graph = None
        return self

    def compile(self) -> None:
        """Make all graphs ready on their device."""
        for part in self.parts.values():
            part.compiled_graph = compile_model(part.model, self.ov_device, self.ov_config)

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write graphs, configurations, scheduler and tokenizers."""
        folder = make_folder(save_directory)
        for name, part in self.parts.items():
            (folder / name).mkdir(exist_ok=True)
            replace_graph(part.model, folder / name / MODEL)
            _write_config(part.config, folder / name)
        _write_rest(self.pipeline, folder, self.index)

    def _read(self, folder: Path, index: Mapping[str, Any]) -> Part:
        name = folder.name
        if not (folder / CONFIG).is_file():
            raise CheckpointError(f"{folder} has no {CONFIG}: copy the one of the original pipeline")
        fields = json.loads((folder / CONFIG).read_text())
        if name in _TEXT_PARTS:
            config = getattr(transformers, index[name][1]).config_class.from_pretrained(folder)
            return TextEncoder(read_model(folder), config, self)
        return (UNet if name == "unet" else Part)(read_model(folder), FrozenDict(fields), self)


class OVStableDiffusionPipeline(OVDiffusionPipeline):
    """Text to picture."""

    pipeline_class = "StableDiffusionPipeline"


class OVStableDiffusionImg2ImgPipeline(OVDiffusionPipeline):
    """Picture and text to picture."""

    pipeline_class = "StableDiffusionImg2ImgPipeline"


class OVStableDiffusionXLPipeline(OVDiffusionPipeline):
    """Text to picture, with two text encoders."""

    pipeline_class = "StableDiffusionXLPipeline"


class OVStableDiffusionXLImg2ImgPipeline(OVDiffusionPipeline):
    """Picture and text to picture, with two text encoders."""

    pipeline_class = "StableDiffusionXLImg2ImgPipeline"


def _fetch(source: str | Path, keywords: Mapping[str, Any]) -> Any:
    try:
        return diffusers.DiffusionPipeline.from_pretrained(str(source), **keywords)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{source} cannot be opened as a pipeline of diffusers ({one_line(str(error))}): name a folder "
            "with model_index.json in it"
        ) from error


def export_pipeline(
    source: Any, out: Path, quantization: Quantization | None, keywords: Mapping[str, Any] | None = None
) -> None:
    """Write the graphs of a pipeline of diffusers, given as itself, a folder or a name, and everything beside them."""
    given = isinstance(source, diffusers.DiffusionPipeline)
    pipeline = source if given else _fetch(source, keywords or {})
    unet = getattr(pipeline, "unet", None)
    if not isinstance(unet, diffusers.UNet2DConditionModel):
        raise LowbitError(
            f"{type(pipeline).__name__} has no U-Net that looks at text: lowbit.openvino.trace(module, inputs) makes a graph of "
            "any of its modules"
        )
    halves = unet.dtype == torch.float16
    if halves:
        pipeline.to(torch.float32)
    graphs = {"unet": trace_unet(pipeline), **trace_vae(pipeline.vae)}
    for name in _TEXT_PARTS:
        if getattr(pipeline, name, None) is not None:
            graphs[name] = trace_text(getattr(pipeline, name))
    for name, graph in graphs.items():
        module = pipeline.vae if name in _VAE_PARTS else getattr(pipeline, name)
        if isinstance(quantization, OVWeightQuantizationConfig):
            graph = compress(graph, quantization, source)
        (out / name).mkdir()
        ov.save_model(graph, out / name / MODEL, compress_to_fp16=halves)
        _write_config(module.config, out / name)
    known = {name: said for name, said in pipeline.config.items() if name != "_name_or_path"}
    index = {"_class_name": type(pipeline).__name__, **known}
    _write_rest(pipeline, out, index)


def _graph_parts(folder: Path) -> list[str]:
    """The parts of a folder that are graphs."""
    return [name for name in ("unet", *_VAE_PARTS, *_TEXT_PARTS) if has_graph(folder / name)]


def _load(folder: Path, library: str | None, kind: str | None) -> Any:
    """A part that is no graph: scheduler, tokenizer, processor, or a module that stays torch's."""
    if library is None or kind is None:
        return None
    return getattr(importlib.import_module(library), kind).from_pretrained(folder)


def _write_config(config: Any, folder: Path) -> None:
    if isinstance(config, transformers.PreTrainedConfig):
        config.save_pretrained(folder)
    else:
        (folder / CONFIG).write_text(json.dumps(dict(config), indent=2, default=str) + "\n")


def _write_rest(pipeline: Any, folder: Path, index: Mapping[str, Any]) -> None:
    """The index, and all that is no graph."""
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    for name, said in index.items():
        part = getattr(pipeline, name, None) if isinstance(said, list | tuple) else None
        if part is not None and name not in (*_TEXT_PARTS, "unet", "vae"):
            part.save_pretrained(folder / name)
