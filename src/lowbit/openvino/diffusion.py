"""Pictures from text: the denoiser, text encoders and autoencoder of a diffusers pipeline as graphs, its own code around them.

    pipeline = OVStableDiffusionPipeline.from_pretrained("folder or model", export=True, load_in_8bit=True)
    pipeline("a cat on the moon", num_inference_steps=20).images[0]

The pipeline is diffusers' class with our parts in the places of its modules, so schedulers, guidance, callbacks and generators are
all its own; what is none of these parts (a safety checker, say) stays a module of torch. The folder keeps the layout of diffusers,
with `openvino_model.xml` in each part's folder, the autoencoder's halves in two, and tokenizers in both forms.
"""

from __future__ import annotations

import importlib
import inspect
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
import transformers

from lowbit.errors import CheckpointError, LowbitError, RecipeError
from lowbit.openvino.base import copy_graphs, device_name
from lowbit.openvino.configs import OVWeightQuantizationConfig, Quantization
from lowbit.openvino.export import save_graph
from lowbit.openvino.exporting import compress
from lowbit.openvino.folders import whole_folder
from lowbit.openvino.library import halved
from lowbit.openvino.opening import MODEL, has_graph, read_model
from lowbit.openvino.picture_export import (
    CONFIG,
    DENOISERS,
    INDEX,
    VAE_PARTS,
    export_pipeline,
    write_config,
    write_rest,
)
from lowbit.openvino.picture_graphs import Autoencoder, FrozenDict, Part, TextEncoder, Transformer, UNet, diffusers
from lowbit.openvino.picture_parts import TEXT_PARTS
from lowbit.openvino.pretrained import FromPretrained

_KINDS = {"unet": UNet, "transformer": Transformer}
# What a pipeline of one family begins with: the end of its class's name before "Pipeline".
_BEGINNINGS = ("Img2Img", "Inpaint", "")


class OVDiffusionPipeline(FromPretrained):
    """A pipeline of diffusers over graphs; what it has, this has."""

    pipeline_class: ClassVar[str] = ""  # of the folder itself
    writes = "lowbit.openvino.diffusion.export_pipeline(pipeline, folder)"
    library = "diffusers"

    def __init__(self, folder: Path, device: str = "CPU", ov_config: Mapping[str, Any] | None = None) -> None:
        self.ov_device, self.ov_config, self.folder = device_name(device), dict(ov_config or {}), folder
        found = _graph_parts(folder)
        lost = [f"{name}/{MODEL}" for name in VAE_PARTS if name not in found]
        lost += [] if (folder / INDEX).is_file() else [INDEX]
        if lost:
            raise CheckpointError(f"{folder} has no {lost[0]}, so it is half a pipeline: export the original again")
        index = self.index = json.loads((folder / INDEX).read_text())
        kind = _class_named(self._named(index["_class_name"]))
        self.parts = {name: self._read(folder / name, index) for name in found}
        taken: dict[str, Any] = {n: part for n, part in self.parts.items() if n not in VAE_PARTS}
        taken["vae"] = Autoencoder(self.parts["vae_encoder"], self.parts["vae_decoder"])
        for name, said in index.items():
            if isinstance(said, list) and name not in taken:
                taken[name] = _load(folder / name, *said)
            elif not isinstance(said, list) and not name.startswith("_"):
                taken[name] = said
        self.pipeline = kind(**_fitting(taken, kind, index["_class_name"], folder))

    @classmethod
    def _named(cls, of_the_folder: str) -> str:
        """The class of diffusers, for that of a folder."""
        return cls.pipeline_class or of_the_folder

    @classmethod
    def _find(cls, model_id: str | Path, keywords: Mapping[str, Any]) -> Path | None:
        folder = Path(model_id).expanduser()
        return folder if _graph_parts(folder) else None

    @classmethod
    def _has_source(cls, folder: Path) -> bool:
        return any(file for name in DENOISERS for file in (folder / name).glob("diffusion_pytorch_model*"))

    @classmethod
    def _looked_for(cls, folder: Path) -> tuple[Path, str]:
        return folder / next((name for name in DENOISERS if (folder / name).is_dir()), DENOISERS[0]), MODEL

    @classmethod
    def _open(cls, folder: Path, *, compile: bool = True, config: Any = None, **words: Any) -> Self:
        if config is not None:
            raise LowbitError("config=: each part of a pipeline has its own in its folder, so leave it out")
        made = cls(folder, words["device"], words["ov_config"])
        if compile:
            made.compile()
        return made

    @classmethod
    def _write(
        cls,
        source: str | Path,
        folder: Path,
        asked: Quantization | None,
        large_in_8_bits: bool,
        keywords: dict[str, Any],
    ) -> None:
        tokenizers = bool(keywords.pop("convert_tokenizer", True))
        export_pipeline(source, folder, asked, keywords, large_in_8_bits=large_in_8_bits, convert_tokenizer=tokenizers)

    def _compress_(self, asked: Quantization, source: Path, keywords: Mapping[str, Any]) -> None:
        if not isinstance(asked, OVWeightQuantizationConfig):
            raise RecipeError(f"{type(asked).__name__} quantises language models: take OVWeightQuantizationConfig here")
        for part in self.parts.values():
            part.model = compress(part.model, asked, source, keywords)

    def __call__(self, *values: Any, **named: Any) -> Any:
        """Make pictures: diffusers' own call."""
        if named.get("clip_skip") is not None and "unet" in self.parts:
            raise LowbitError("clip_skip reads inside of the text encoder, which is a graph: leave it out")
        return self.pipeline(*values, **named)

    def __getattr__(self, name: str) -> Any:
        if name == "pipeline":
            raise AttributeError(name)
        return getattr(self.pipeline, name)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        made: Self = copy_graphs(self, memo, shared=("_kept",))
        return made

    def __setattr__(self, name: str, value: Any) -> None:
        made = self.__dict__.get("pipeline")
        if made is None or name not in made.config:
            object.__setattr__(self, name, value)
            return
        if isinstance(made.config[name], list | tuple):
            made.register_modules(**{name: value})
        else:
            setattr(made, name, value)
        if isinstance(value, Part) and name in self.parts:
            self.parts[name] = value

    def to(self, device: Any) -> Self:
        """Run the graphs on another of OpenVINO's devices from the next call on."""
        self.ov_device = device_name(device)
        self.clear_requests()
        return self

    def clear_requests(self) -> None:
        """Give back what the device holds; the next call makes it ready again."""
        for part in self.parts.values():
            part.compiled_graph = None

    def compile(self, *_: Any, **__: Any) -> None:
        """Make all graphs ready on their device."""
        for part in self.parts.values():
            part.make_ready()

    def half(self) -> Self:
        """Weights of 32 bits in 16, in memory and in what `save_pretrained` writes; low-bit ones stay."""
        for part in self.parts.values():
            part.model = halved(part.model)
        return self

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write graphs, configurations, scheduler and tokenizers."""
        target = Path(save_directory).expanduser()
        with whole_folder(target) as folder:
            for name, part in self.parts.items():
                (folder / name).mkdir()
                save_graph(part.model, folder / name / MODEL)
                write_config(part.config, folder / name)
            write_rest(self.pipeline, folder, self.index | self._further())
            if self.folder.resolve() != target.resolve():
                for file in self.folder.glob("tokenizer*/openvino_*"):
                    shutil.copy(file, folder / file.parent.name / file.name)

    def _further(self) -> dict[str, list[Any]]:
        """What the index says of the parts that are no graphs, of which some may have been exchanged."""
        config = {name: said for name, said in self.pipeline.config.items() if isinstance(said, list | tuple)}
        return {name: list(said) for name, said in config.items() if name not in self.parts and name != "vae"}

    def _read(self, folder: Path, index: Mapping[str, Any]) -> Part:
        name = folder.name
        if not (folder / CONFIG).is_file():
            raise CheckpointError(f"{folder} has no {CONFIG}: copy the one of the original pipeline")
        fields = json.loads((folder / CONFIG).read_text())
        if name in TEXT_PARTS:
            config = getattr(transformers, index[name][1]).config_class.from_pretrained(folder)
            return TextEncoder(read_model(folder), config, self)
        return _KINDS.get(name, Part)(read_model(folder), FrozenDict(fields), self)


class _OfTheFamily(OVDiffusionPipeline):
    """The class of a folder's family that begins with what is asked for."""

    begins_with: ClassVar[str] = ""

    @classmethod
    def _named(cls, of_the_folder: str) -> str:
        family = of_the_folder.removesuffix("Pipeline")
        for beginning in _BEGINNINGS:
            family = family.removesuffix(beginning)
        return f"{family}{cls.begins_with}Pipeline"


class OVPipelineForText2Image(_OfTheFamily):
    """Text to picture, by the class of the folder's family."""


class OVPipelineForImage2Image(_OfTheFamily):
    """Picture and text to picture."""

    begins_with = "Img2Img"


class OVPipelineForInpainting(_OfTheFamily):
    """A picture with a part of it made anew."""

    begins_with = "Inpaint"


class OVStableDiffusionPipeline(OVDiffusionPipeline):
    """Text to picture."""

    pipeline_class = "StableDiffusionPipeline"


class OVStableDiffusionImg2ImgPipeline(OVDiffusionPipeline):
    """Picture and text to picture."""

    pipeline_class = "StableDiffusionImg2ImgPipeline"


class OVStableDiffusionInpaintPipeline(OVDiffusionPipeline):
    """A picture with a part of it made anew."""

    pipeline_class = "StableDiffusionInpaintPipeline"


class OVStableDiffusionXLPipeline(OVDiffusionPipeline):
    """Text to picture, with two text encoders."""

    pipeline_class = "StableDiffusionXLPipeline"


class OVStableDiffusionXLImg2ImgPipeline(OVDiffusionPipeline):
    """Picture and text to picture, with two text encoders."""

    pipeline_class = "StableDiffusionXLImg2ImgPipeline"


class OVStableDiffusionXLInpaintPipeline(OVDiffusionPipeline):
    """A picture with a part of it made anew, with two text encoders."""

    pipeline_class = "StableDiffusionXLInpaintPipeline"


class OVStableDiffusion3Pipeline(OVDiffusionPipeline):
    """Text to picture by a transformer, with three text encoders."""

    pipeline_class = "StableDiffusion3Pipeline"


class OVStableDiffusion3Img2ImgPipeline(OVDiffusionPipeline):
    """Picture and text to picture by a transformer."""

    pipeline_class = "StableDiffusion3Img2ImgPipeline"


class OVLatentConsistencyModelPipeline(OVDiffusionPipeline):
    """Text to picture in few steps."""

    pipeline_class = "LatentConsistencyModelPipeline"


class OVFluxPipeline(OVDiffusionPipeline):
    """Text to picture by a transformer."""

    pipeline_class = "FluxPipeline"


class OVFluxImg2ImgPipeline(OVDiffusionPipeline):
    """Picture and text to picture by a transformer."""

    pipeline_class = "FluxImg2ImgPipeline"


class OVFluxInpaintPipeline(OVDiffusionPipeline):
    """A picture with a part of it made anew by a transformer."""

    pipeline_class = "FluxInpaintPipeline"


def _graph_parts(folder: Path) -> list[str]:
    """The parts of a folder that are graphs."""
    return [name for name in (*DENOISERS, *VAE_PARTS, *TEXT_PARTS) if has_graph(folder / name)]


def _class_named(name: str) -> Any:
    found = getattr(diffusers, name, None)
    if found is None:
        raise LowbitError(
            f"diffusers {diffusers.__version__} has no {name}: take OVDiffusionPipeline, the folder's own"
        )
    return found


def _fitting(taken: Mapping[str, Any], kind: Any, of_the_folder: str, folder: Path) -> dict[str, Any]:
    """What a class of diffusers is made of, where the folder is one of its family's."""
    known = dict(inspect.signature(kind).parameters)
    needed = {name for name, one in known.items() if one.default is one.empty}
    parts = {name for name, value in taken.items() if not isinstance(value, bool | int | float | str | None)}
    odd = sorted((parts - known.keys()) | (needed - taken.keys()))
    if odd:
        raise CheckpointError(
            f"{folder} holds a {of_the_folder}, whose parts are not those of a {kind.__name__} ({odd[0]}): open it with "
            "OVDiffusionPipeline"
        )
    return {name: value for name, value in taken.items() if name in known}


def _load(folder: Path, library: str | None, kind: str | None) -> Any:
    """A part that is no graph: scheduler, tokenizer, processor, or a module that stays torch's."""
    if library is None or kind is None:
        return None
    # A safety checker is "stable_diffusion"'s: a room of diffusers' own.
    room = getattr(diffusers.pipelines, library, None) or importlib.import_module(library)
    found = getattr(room, kind).from_pretrained(folder)
    return found.float() if isinstance(found, torch.nn.Module) else found  # graphs give float32, whatever was saved
