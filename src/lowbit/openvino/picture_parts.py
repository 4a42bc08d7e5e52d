"""The modules of a pipeline that makes pictures, each as a graph with one tensor for each input and output.

text encoder    input_ids -> what it gives, and hidden_states.0, hidden_states.1, ...
U-Net           sample, timestep, encoder_hidden_states, [text_embeds, time_ids] -> out_sample
autoencoder     sample -> latent_parameters                latent_sample -> sample
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lowbit.errors import LowbitError
from lowbit.openvino.tracing import trace


class _Text(nn.Module):
    """A text encoder with what is between its layers as outputs of their own."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module

    def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        found = self.module(input_ids, output_hidden_states=True)
        tensors = {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}
        return tensors | {f"hidden_states.{layer}": value for layer, value in enumerate(found.hidden_states)}


class _Further(nn.Module):
    """A U-Net with its further conditions as arguments."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module

    def forward(self, sample: Any, timestep: Any, encoder_hidden_states: Any, **added: torch.Tensor) -> Any:
        return self.module(sample, timestep, encoder_hidden_states, added_cond_kwargs=added, return_dict=False)[0]


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


def trace_text(module: Any) -> Any:
    ids = torch.ones(2, module.config.max_position_embeddings, dtype=torch.long)
    with torch.no_grad():
        outputs = list(_Text(module)(ids))
    return trace(_Text(module), {"input_ids": ids}, outputs).model


def trace_unet(pipeline: Any) -> Any:
    unet = pipeline.unet
    config = unet.config
    size = config.sample_size if isinstance(config.sample_size, int) else config.sample_size[0]
    width = config.cross_attention_dim if isinstance(config.cross_attention_dim, int) else config.cross_attention_dim[0]
    inputs = {
        "sample": torch.randn(2, config.in_channels, size, size),
        "timestep": torch.tensor(10.0),
        "encoder_hidden_states": torch.randn(2, 7, width),
    }
    if config.addition_embed_type == "text_time":
        pooled = pipeline.text_encoder_2.config.projection_dim
        times = (config.projection_class_embeddings_input_dim - pooled) // config.addition_time_embed_dim
        inputs |= {"text_embeds": torch.randn(2, pooled), "time_ids": torch.randn(2, times)}
    elif config.addition_embed_type is not None or config.class_embed_type is not None:
        raise LowbitError(
            f"this U-Net has further conditions ({config.addition_embed_type}), which no pipeline here gives it"
        )
    return trace(_Further(unet), inputs, ["out_sample"]).model


def trace_vae(vae: Any) -> dict[str, Any]:
    config = vae.config
    side = 8 * 2 ** (len(config.block_out_channels) - 1)
    return {
        "vae_encoder": trace(
            _Encode(vae), {"sample": torch.randn(1, config.in_channels, side, side)}, ["latent_parameters"]
        ).model,
        "vae_decoder": trace(
            _Decode(vae), {"latent_sample": torch.randn(1, config.latent_channels, 8, 8)}, ["sample"]
        ).model,
    }
