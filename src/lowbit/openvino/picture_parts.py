"""The modules of a pipeline that makes pictures, each as a graph with one tensor for each input and output.

text encoder    input_ids -> what it gives, and hidden_states.0, hidden_states.1, ... of those of CLIP
U-Net           sample, timestep, encoder_hidden_states, [timestep_cond], [text_embeds, time_ids] -> out_sample
transformer     hidden_states, timestep, encoder_hidden_states, pooled_projections, [guidance], [txt_ids, img_ids] -> out_sample
autoencoder     sample -> latent_parameters                latent_sample -> sample

Names, order and types are those that OpenVINO's own pipelines ask for; a U-Net's steps are whole numbers for that reason.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lowbit.errors import LowbitError
from lowbit.openvino.tracing import trace

TEXT_PARTS = ("text_encoder", "text_encoder_2", "text_encoder_3")
# The transformers that can be followed, by their classes.
TRANSFORMERS = ("FluxTransformer2DModel", "SD3Transformer2DModel")
_TOKENS = 16  # of a text encoder that says nothing of how many it reads


class _Text(nn.Module):
    """A text encoder with what is between its layers as outputs of their own, where pipelines ask for that."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module
        self.layers = "clip" in module.config.model_type

    def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        found = self.module(input_ids, output_hidden_states=self.layers)
        tensors = {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}
        return tensors | {f"hidden_states.{layer}": value for layer, value in enumerate(found.hidden_states or ())}


class _Further(nn.Module):
    """A U-Net with its further conditions as arguments."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module

    def forward(
        self, sample: Any, timestep: Any, encoder_hidden_states: Any, timestep_cond: Any = None, **added: torch.Tensor
    ) -> Any:
        options = {"timestep_cond": timestep_cond, "added_cond_kwargs": added, "return_dict": False}
        return self.module(sample, timestep, encoder_hidden_states, **options)[0]


class _Encode(nn.Module):
    """The first half of an autoencoder, up to the numbers that latents are drawn by."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        parameters: torch.Tensor = self.module.encode(sample).latent_dist.parameters
        return parameters


class _Decode(nn.Module):
    """The second half."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module

    def forward(self, latent_sample: torch.Tensor) -> torch.Tensor:
        sample: torch.Tensor = self.module.decode(latent_sample, return_dict=False)[0]
        return sample


@dataclass(frozen=True)
class Call:
    """How a part is called, which is what its graph is made of and compared with."""

    module: nn.Module
    inputs: dict[str, torch.Tensor]
    outputs: tuple[str, ...]
    fixed: dict[str, Any] = field(default_factory=dict)

    def graph(self) -> Any:
        return trace(self.module, self.inputs, self.outputs, self.fixed).model

    def answer(self) -> dict[str, torch.Tensor]:
        """What the module of torch gives."""
        with torch.no_grad():
            found = self.module(**self.inputs, **self.fixed)
        if isinstance(found, torch.Tensor):
            return {self.outputs[0]: found}
        return dict(found) if isinstance(found, dict) else dict(zip(self.outputs, found, strict=False))


def call_of_text(module: Any) -> Call:
    ids = torch.ones(2, getattr(module.config, "max_position_embeddings", _TOKENS), dtype=torch.long)
    called = _Text(module)
    with torch.no_grad():
        return Call(called, {"input_ids": ids}, tuple(called(ids)))


def call_of_unet(pipeline: Any) -> Call:
    unet = pipeline.unet
    config = unet.config
    size = config.sample_size if isinstance(config.sample_size, int) else config.sample_size[0]
    width = config.cross_attention_dim if isinstance(config.cross_attention_dim, int) else config.cross_attention_dim[0]
    inputs = {
        "sample": torch.randn(2, config.in_channels, size, size),
        "timestep": torch.tensor([10]),
        "encoder_hidden_states": torch.randn(2, 7, width),
    }
    if config.time_cond_proj_dim is not None:
        inputs["timestep_cond"] = torch.randn(2, config.time_cond_proj_dim)
    if config.addition_embed_type == "text_time":
        pooled = pipeline.text_encoder_2.config.projection_dim
        times = (config.projection_class_embeddings_input_dim - pooled) // config.addition_time_embed_dim
        inputs |= {"text_embeds": torch.randn(2, pooled), "time_ids": torch.randn(2, times)}
    elif config.addition_embed_type is not None or config.class_embed_type is not None:
        raise LowbitError(
            f"this U-Net has further conditions ({config.addition_embed_type}), which no pipeline here gives it"
        )
    return Call(_Further(unet), inputs, ("out_sample",))


def call_of_transformer(transformer: Any) -> Call:
    config = transformer.config
    inputs = {
        "hidden_states": torch.randn(2, config.in_channels, 8, 8),
        "timestep": torch.tensor([0.5, 0.25]),
        "encoder_hidden_states": torch.randn(2, 7, config.joint_attention_dim),
        "pooled_projections": torch.randn(2, config.pooled_projection_dim),
    }
    if type(transformer).__name__ == TRANSFORMERS[0]:
        inputs["hidden_states"] = torch.randn(2, 16, config.in_channels)
        if config.guidance_embeds:
            inputs["guidance"] = torch.tensor([3.5, 3.0])
        inputs |= {"txt_ids": torch.zeros(7, 3), "img_ids": torch.rand(16, 3)}
    return Call(transformer, inputs, ("out_sample",), {"return_dict": False})


def calls_of_vae(vae: Any) -> dict[str, Call]:
    config = vae.config
    side = 8 * 2 ** (len(config.block_out_channels) - 1)
    picture = {"sample": torch.randn(1, config.in_channels, side, side)}
    latents = {"latent_sample": torch.randn(1, config.latent_channels, 8, 8)}
    return {
        "vae_encoder": Call(_Encode(vae), picture, ("latent_parameters",)),
        "vae_decoder": Call(_Decode(vae), latents, ("sample",)),
    }


def calls_of(pipeline: Any) -> dict[str, tuple[Any, Call]]:
    """Each part by the name of its folder: its module, and how that is called."""
    found: dict[str, tuple[Any, Call]] = {}
    if getattr(pipeline, "unet", None) is not None:
        found["unet"] = pipeline.unet, call_of_unet(pipeline)
    if getattr(pipeline, "transformer", None) is not None:
        found["transformer"] = pipeline.transformer, call_of_transformer(pipeline.transformer)
    found |= {name: (pipeline.vae, call) for name, call in calls_of_vae(pipeline.vae).items()}
    texts = {name: getattr(pipeline, name, None) for name in TEXT_PARTS}
    return found | {name: (module, call_of_text(module)) for name, module in texts.items() if module is not None}
