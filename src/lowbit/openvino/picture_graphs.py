"""Graphs in the places of a diffusers pipeline's modules: each is called as its module is, and gives what that gives.

The one door to the package diffusers. On disk a U-Net counts its steps in whole numbers, as OpenVINO's own pipelines give them to
it; schedulers of diffusers step between them too, so that here the graph is made ready for steps of any size.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any, Self

import numpy as np
import torch
import transformers
from torch import nn

from lowbit.errors import LowbitError, MissingPackageError
from lowbit.openvino.base import copy_graphs
from lowbit.openvino.library import ov
from lowbit.openvino.opening import compile_model, infer

try:
    import diffusers
    from diffusers.configuration_utils import FrozenDict
    from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
    from diffusers.models.modeling_outputs import AutoencoderKLOutput, Transformer2DModelOutput
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
except ModuleNotFoundError as error:
    if error.name is None or error.name.partition(".")[0] != "diffusers":
        raise
    raise MissingPackageError("diffusers", "a pipeline that makes pictures", "diffusion") from error

__all__ = ["Autoencoder", "FrozenDict", "Part", "TextEncoder", "Transformer", "UNet", "diffusers"]

_STEP = "timestep"


class _InPlace(nn.Module):
    """What a pipeline asks of each of its modules: where tensors go in and come out, and as what."""

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    def to(self, *_: Any, **__: Any) -> Self:
        """Tensors go in and come out on the CPU; the pipeline's `to` names the device of the graphs."""
        return self


class Part(_InPlace):
    """A graph in the place of a module of a pipeline: `model` is an `openvino.Model` that may be exchanged."""

    def __init__(self, graph: Any, config: Any, pipeline: Any) -> None:
        super().__init__()
        self.graph, self.compiled_graph, self.config = graph, None, config
        self.pipeline: Any = SimpleNamespace(of=pipeline)  # no module of this module

    @property
    def model(self) -> Any:
        return self.graph

    @model.setter
    def model(self, graph: Any) -> None:
        self.graph, self.compiled_graph = graph, None

    def make_ready(self) -> Any:
        """The graph, ready on the pipeline's device."""
        if self.compiled_graph is None:
            owner = self.pipeline.of
            self.compiled_graph = compile_model(_with_any_steps(self.graph), owner.ov_device, owner.ov_config)
        return self.compiled_graph

    def run(self, **given: Any) -> dict[str, torch.Tensor]:
        """What the graph gives, by name."""
        compiled = self.make_ready()
        arrays = {}
        for port in compiled.inputs:
            name = port.get_any_name()
            if name not in given:
                raise LowbitError(f"the graph needs {name}, and is given {', '.join(given)}")
            arrays[name] = np.asarray(given[name]).astype(port.get_element_type().to_dtype(), copy=False)
            if name == _STEP:
                arrays[name] = arrays[name].reshape(arrays[name].shape or (1,) * len(port.get_partial_shape()))
        answer = infer(compiled, arrays)
        return {port.get_any_name(): torch.from_numpy(answer[port].copy()) for port in compiled.outputs}

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        made: Self = copy_graphs(self, memo)
        return made


def _with_any_steps(graph: Any) -> Any:
    """The graph with steps as numbers with fractions, where it has whole ones."""
    made = graph.clone()
    for parameter in made.get_parameters():
        if _STEP in parameter.output(0).get_names() and parameter.get_element_type() == ov.Type.i64:
            parameter.set_element_type(ov.Type.f32)
    made.validate_nodes_and_infer_types()
    return made


class UNet(Part):
    """What takes noise away, step by step."""

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
        if cross_attention_kwargs:
            raise LowbitError("the graph of this U-Net takes no cross_attention_kwargs: leave them out")
        given = {"sample": sample, _STEP: timestep, "encoder_hidden_states": encoder_hidden_states}
        given |= {} if timestep_cond is None else {"timestep_cond": timestep_cond}
        found = self.run(**given, **(added_cond_kwargs or {}))["out_sample"]
        return UNet2DConditionOutput(sample=found) if return_dict else (found,)


class Transformer(Part):
    """The same, made of attention alone."""

    def forward(self, *, return_dict: bool = True, **named: Any) -> Any:
        given = {name: value for name, value in named.items() if value is not None and value != {}}
        odd = [name for name, value in given.items() if not isinstance(value, torch.Tensor)]
        if odd:
            raise LowbitError(f"the graph of this transformer takes no {odd[0]}: leave it out")
        found = self.run(**given)["out_sample"]
        return Transformer2DModelOutput(sample=found) if return_dict else (found,)

    def cache_context(self, _: str) -> AbstractContextManager[None]:
        """Nothing is kept from step to step."""
        return nullcontext()


class TextEncoder(Part):
    def forward(
        self, input_ids: torch.Tensor, attention_mask: Any = None, output_hidden_states: bool = False, **_: Any
    ) -> Any:
        found = self.run(input_ids=input_ids)
        layers = [name for name in found if name.startswith("hidden_states.")]
        hidden = tuple(found.pop(name) for name in layers)
        kind = transformers.modeling_outputs.BaseModelOutput
        if "pooler_output" in found:
            kind = transformers.modeling_outputs.BaseModelOutputWithPooling
        if "text_embeds" in found:
            kind = transformers.models.clip.modeling_clip.CLIPTextModelOutput
        return kind(**found, hidden_states=hidden if output_hidden_states else None)


class Autoencoder(_InPlace):
    """Both halves of the autoencoder, as one module of the pipeline."""

    def __init__(self, encoder: Part, decoder: Part) -> None:
        super().__init__()
        self.encoder, self.decoder, self.config = encoder, decoder, decoder.config

    def decode(self, z: torch.Tensor, return_dict: bool = True, generator: Any = None) -> Any:
        found = self.decoder.run(latent_sample=z)["sample"]
        return DecoderOutput(sample=found) if return_dict else (found,)

    def encode(self, x: torch.Tensor, return_dict: bool = True) -> Any:
        latents = DiagonalGaussianDistribution(self.encoder.run(sample=x)["latent_parameters"])
        return AutoencoderKLOutput(latent_dist=latents) if return_dict else (latents,)
