"""A pipeline of diffusers as a folder of graphs, which OpenVINO's own pipelines read too.

unet or transformer, text_encoder, text_encoder_2, ..., vae_encoder, vae_decoder     a graph and a config.json each
tokenizer, tokenizer_2, ...            as they came, and as graphs
scheduler and what else there is       as they came; model_index.json names all of it
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

from lowbit.errors import CheckpointError, LowbitError, RecipeError, one_line
from lowbit.openvino.configs import OVWeightQuantizationConfig, Quantization
from lowbit.openvino.exporting import compress
from lowbit.openvino.folders import make_folder
from lowbit.openvino.library import save
from lowbit.openvino.opening import MODEL
from lowbit.openvino.picture_graphs import diffusers
from lowbit.openvino.picture_parts import TEXT_PARTS, TRANSFORMERS, calls_of
from lowbit.openvino.recipes import LARGE
from lowbit.openvino.tokenizer import has_tokenizer, write_tokenizers

INDEX = "model_index.json"
CONFIG = "config.json"
DENOISERS = ("unet", "transformer")
VAE_PARTS = ("vae_encoder", "vae_decoder")


def export_pipeline(
    source: Any,
    out: str | Path,
    quantization: Quantization | None = None,
    keywords: Mapping[str, Any] | None = None,
    *,
    large_in_8_bits: bool = True,
    convert_tokenizer: bool = True,
) -> None:
    """Write the graphs of a pipeline of diffusers, given as itself, a folder or a name, and everything beside them."""
    if quantization is not None and not isinstance(quantization, OVWeightQuantizationConfig):
        raise RecipeError(
            f"{type(quantization).__name__} quantises language models: take OVWeightQuantizationConfig here"
        )
    out = make_folder(out)
    given = isinstance(source, diffusers.DiffusionPipeline)
    pipeline = source if given else fetch(source, keywords or {})
    denoiser = next((part for name in DENOISERS if (part := getattr(pipeline, name, None)) is not None), None)
    if type(denoiser).__name__ not in (diffusers.UNet2DConditionModel.__name__, *TRANSFORMERS):
        raise LowbitError(
            f"{type(pipeline).__name__} has no U-Net and no transformer that looks at text as lowbit knows it: "
            "lowbit.openvino.trace(module, inputs) makes a graph of any of its modules"
        )
    assert denoiser is not None
    halves = denoiser.dtype == torch.float16  # each part is followed as a copy in float32: the pipeline stays as it is
    for name, (module, call) in calls_of(pipeline).items():
        graph = call.graph()
        asked = quantization
        if asked is None and large_in_8_bits and sum(weight.numel() for weight in module.parameters()) >= LARGE:
            print(f"lowbit: {name} has above 1e9 weights: 8 bits each; load_in_8bit=False keeps them", file=sys.stderr)
            asked = OVWeightQuantizationConfig(bits=8)
        if asked is not None:
            graph = compress(graph, asked, source)
        (out / name).mkdir(exist_ok=True)
        save(graph, out / name / MODEL, halves)
        write_config(module.config, out / name)
    known = {name: said for name, said in pipeline.config.items() if name != "_name_or_path"}
    index = {"_class_name": type(pipeline).__name__, **known}
    write_rest(pipeline, out, index)
    for folder in sorted(out.glob("tokenizer*")) if convert_tokenizer else ():
        for note in write_tokenizers(folder) if has_tokenizer(folder) else ():
            print(f"lowbit: {folder.name}: {note}", file=sys.stderr)


def fetch(source: str | Path, keywords: Mapping[str, Any]) -> Any:
    """A pipeline of diffusers."""
    try:
        return diffusers.DiffusionPipeline.from_pretrained(str(source), **keywords)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{source} cannot be opened as a pipeline of diffusers ({one_line(str(error))}): name a folder "
            "with model_index.json in it"
        ) from error


def write_config(config: Any, folder: Path) -> None:
    if isinstance(config, transformers.PreTrainedConfig):
        config.save_pretrained(folder)
    else:
        (folder / CONFIG).write_text(json.dumps(dict(config), indent=2, default=str) + "\n")


def write_rest(pipeline: Any, folder: Path, index: Mapping[str, Any]) -> None:
    """The index, and all that is no graph."""
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    for name, said in index.items():
        part = getattr(pipeline, name, None) if isinstance(said, list | tuple) else None
        if part is not None and name not in (*DENOISERS, *TEXT_PARTS, "vae"):
            part.save_pretrained(folder / name)
