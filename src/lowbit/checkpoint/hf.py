"""The meeting with transformers: a configuration and a quantiser for its loader.

transformers asks a quantiser three things while it loads a model: which tensors of the checkpoint are the quantiser's
(`wants`), what to do with each (an operation that gets one weight at a time and returns nothing, because the packed
weight is already in its place), and what is left to do at the end (choose kernels, leave the report). The same class
serves a checkpoint in full precision, packed on the way in, and a folder that is low-bit already.

What differs between minor versions of transformers 5 is met here alone: arguments are taken by name, extra ones ignored.
"""

from __future__ import annotations

import copy
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lowbit.blockwise import check_data
from lowbit.bridge import attach_engine
from lowbit.checkpoint import compressed
from lowbit.checkpoint.devices import check_device_map
from lowbit.checkpoint.form import parts, saved_form
from lowbit.checkpoint.hf_names import keep_renamings_only_
from lowbit.checkpoint.layout import held_weights
from lowbit.checkpoint.loading_bar import replace_next_bar
from lowbit.checkpoint.pages import Pages
from lowbit.checkpoint.plain_save import attach_saving
from lowbit.checkpoint.save import recipe_fields
from lowbit.checkpoint.sites import Packing, Reading
from lowbit.checkpoint.verdict import refuse_other_layers
from lowbit.contents import REPORT, read_header, read_json
from lowbit.errors import FormatError, LowbitError
from lowbit.layers import LowBitConv, LowBitEmbedding, LowBitExperts, prepare_
from lowbit.methods import COMPRESSED_METHOD, OWN_METHOD
from lowbit.packing import BUFFERS
from lowbit.quantize import finish
from lowbit.recipe import Recipe
from lowbit.report import LayerReport, Report, Skipped

_UP_PATTERNS = ("up_proj", "down_proj")


def reads(fields: dict[str, Any]) -> bool:
    """Whether lowbit reads a folder with this quantization_config."""
    method = fields.get("quant_method")
    return method == OWN_METHOD or (method == COMPRESSED_METHOD and compressed.unreadable(fields) is None)


@dataclass(frozen=True)
class Job:
    """The kernel of a loaded model by name, None for the first that fits, what it computes in, and how much inputs matter."""

    kernel: str | None = None
    compute: str = "auto"
    imatrix: str | Path | None = None


class LowBitConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """What config.json says about a low-bit model, or the recipe for one that is being made."""

    def __init__(
        self, fields: dict[str, Any] | None = None, recipe: Recipe | None = None, job: Job | None = None
    ) -> None:
        self.fields = fields or {"quant_method": OWN_METHOD, "recipe": recipe.to_dict() if recipe else {}}
        self.recipe = recipe
        self.job = job or Job()
        self.quant_method = self.fields["quant_method"]

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **options: Any) -> Any:
        fields = copy.deepcopy(config_dict)
        own = fields if fields["quant_method"] == OWN_METHOD else fields.get(OWN_METHOD) or {}
        if fields["quant_method"] == OWN_METHOD and not fields.get("layers") and not own.get("recipe"):
            raise FormatError("quantization_config says quant_method 'lowbit' but names neither layers nor a recipe")
        config = cls(fields, Recipe.from_dict(own["recipe"]) if own.get("recipe") else None)
        return (config, options) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        return copy.deepcopy(self.fields)

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()


class Unusable:
    """Stands for a weight that could not be made: whoever touches it gets the reason.

    transformers turns every error of an operation into a line of a table and goes on; an error that comes when the result is put
    in its place ends the load at once, with lowbit's own sentence.
    """

    def __init__(self, error: LowbitError) -> None:
        self._error = error

    def __getattr__(self, name: str) -> Any:
        raise self._error


class PackWeight(ConversionOps):  # type: ignore[misc]
    """Packs one dense weight of the checkpoint and hands nothing on."""

    def __init__(self, hf_quantizer: LowBitQuantizer) -> None:
        self.hf_quantizer = hf_quantizer

    def convert(self, input_dict: dict[str, Any], missing_keys: set[str] | None = None, **_: Any) -> dict[str, Any]:
        left = {}
        for name, value in input_dict.items():
            weight = value[0] if isinstance(value, list) else value
            if not self.hf_quantizer.packing.wants(name):
                left[name] = value
                continue
            try:
                self.hf_quantizer.pack(name, weight, missing_keys)
            except LowbitError as error:
                return {name: Unusable(error)}
        return left


class ReadWeight(ConversionOps):  # type: ignore[misc]
    """Puts one packed weight in place. `sources` are the linears that the checkpoint keeps of a fused weight, in their order."""

    def __init__(self, hf_quantizer: LowBitQuantizer, sources: tuple[str, ...] = ()) -> None:
        self.hf_quantizer = hf_quantizer
        self.sources = sources

    def __deepcopy__(self, memo: dict[int, Any]) -> ReadWeight:
        """The loader copies a converter for every weight; a copy of the quantiser, and of the model in it, would be lost."""
        return self

    def convert(
        self,
        input_dict: dict[str, list[torch.Tensor]],
        full_layer_name: str = "",
        missing_keys: set[str] | None = None,
        **_: Any,
    ) -> dict[str, Any]:
        tensors: dict[str, torch.Tensor] = {}
        if self.sources:
            tensors = fuse(input_dict, self.sources)
        else:
            for pattern, values in input_dict.items():
                tensors[pattern.rpartition(".")[2].removesuffix("$")] = values[0]
            if compressed.WHOLE in tensors and self.hf_quantizer.reading.leaves(full_layer_name):
                return {full_layer_name: tensors[compressed.WHOLE]}
        try:
            self.hf_quantizer.reading.read(full_layer_name, tensors, missing_keys)
        except LowbitError as error:
            return {full_layer_name: Unusable(error)}
        return {}

    @property
    def reverse_op(self) -> ConversionOps:
        return self


def fuse(collected: dict[str, list[torch.Tensor]], sources: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """The linears of all experts as one fused packed weight: experts stacked, sources joined along the outputs."""
    tensors = {}
    for part in (compressed.PACKED, compressed.SCALE, compressed.ZERO):
        names = [source.removesuffix("weight") + part for source in sources]
        if all(collected.get(name) for name in names):
            stacked = [torch.stack(list(collected[name])) for name in names]
            tensors[part] = torch.cat(stacked, dim=1)
    return tensors


class LowBitQuantizer(HfQuantizer):  # type: ignore[misc]
    """Packs, reads and saves low-bit models for transformers."""

    requires_calibration = False
    quantization_config: LowBitConfig

    def __init__(self, quantization_config: LowBitConfig, **options: Any) -> None:
        super().__init__(quantization_config, **options)
        self.packing: Any = None
        self.reading: Any = None
        self.pages = Pages(())
        self.start = 0.0

    # --- before loading ---

    def update_device_map(self, device_map: Any) -> Any:
        check_device_map(device_map)
        return device_map

    def validate_environment(self, *_: Any, device_map: Any = None, **__: Any) -> None:
        """Called again with the map that stands for a word such as "auto"."""
        check_device_map(device_map)

    def _convert_model_for_quantization(self, model: nn.Module) -> None:
        """transformers takes fused experts apart for compressed-tensors; a folder that lowbit wrote has them as the model does."""
        if OWN_METHOD not in self.quantization_config.fields:
            super()._convert_model_for_quantization(model)

    def _process_model_before_weight_loading(self, model: nn.Module, **options: Any) -> None:
        self.start = time.perf_counter()
        replace_next_bar("loading" if self.pre_quantized else "packing")
        files = [str(f) for f in options.get("checkpoint_files") or ()]
        files = [f for f in files if f.endswith(".safetensors")]
        names = [tensor.name for file in files for tensor in read_header(Path(file))]
        self.pages = Pages(files)
        if self.pre_quantized:
            folder = Path(files[0]).parent if files else None
            ignored = [re.compile(pattern) for pattern in cast(Any, model)._keys_to_ignore_on_load_unexpected or ()]
            known = [name for name in names if not any(pattern.search(name) for pattern in ignored)]
            refuse_other_layers(str(folder), model, known)
            self.reading = Reading(model, self.quantization_config.fields, folder)
        elif (recipe := self.quantization_config.recipe) is not None:
            # While a checkpoint streams in there is no model yet that could be run.
            check_data(recipe, None)
            self.packing = Packing(model, recipe, self.quantization_config.job.imatrix)
        else:
            raise FormatError("the quantization_config given names no recipe")

    def param_needs_quantization(self, model: nn.Module, param_name: str, **_: Any) -> bool:
        return self.packing is not None and self.packing.wants(param_name)

    def param_element_size(self, model: nn.Module, param_name: str, param: torch.Tensor) -> float:
        sites = self.packing or self.reading
        if sites is None or not sites.wants(param_name):
            return float(param.element_size())
        recipe = self.quantization_config.recipe
        return recipe.linear.bits_per_weight / 8 if recipe else 0.6

    # --- while loading ---

    def get_quantize_ops(self) -> PackWeight:
        return PackWeight(self)

    def get_weight_conversions(self) -> list[WeightConverter]:
        if not self.pre_quantized:
            return []
        if self.quantization_config.quant_method == COMPRESSED_METHOD:
            copies = [WeightConverter(name, name, [ReadWeight(self)]) for name in self.reading.copies]
            integers = [f"{name}$" for name in compressed.INTEGER_NAMES] if self.reading.integers else []
            return [*copies, WeightConverter(integers or list(compressed.NAMES), "weight", [ReadWeight(self)])]
        whole = [f"packed_weight.{name}" for name in BUFFERS]
        converters = [WeightConverter(whole, "weight", [ReadWeight(self)])]
        experts = [WeightConverter([f"{k}.{name}" for name in BUFFERS], k, [ReadWeight(self)]) for k in _UP_PATTERNS]
        return [*converters, *experts]

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any = None) -> list[Any]:
        """A checkpoint of packed experts is fused by lowbit: transformers' own operations know only dense ones."""
        if not self.pre_quantized or self.quantization_config.quant_method != COMPRESSED_METHOD:
            return [*weight_conversions, *self.get_weight_conversions()]
        return [*(self._fusing(c) for c in weight_conversions), *self.get_weight_conversions()]

    def _fusing(self, conversion: Any) -> Any:
        if not isinstance(conversion, WeightConverter) or len(conversion.target_patterns) != 1:
            return conversion
        if not any(self.reading.wants(n) for n in self.reading.by_name if n.endswith(conversion.target_patterns[0])):
            return conversion
        sources = tuple(conversion.source_patterns)
        packed = [source.removesuffix("weight") + part for source in sources for part in compressed.NAMES]
        fused = WeightConverter(packed, conversion.target_patterns[0], [ReadWeight(self, sources)])
        for scope in ("scope_prefix", "base_model_prefix"):
            if hasattr(conversion, scope):
                setattr(fused, scope, getattr(conversion, scope))
        return fused

    def pack(self, name: str, weight: torch.Tensor, missing: set[str] | None) -> None:
        with torch.no_grad():
            self.packing.pack(name, weight, missing)
        self.pages.was_read(weight.nbytes)

    # --- after loading ---

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        job = self.quantization_config.job
        (self.reading or self.packing).check_shapes()
        if self.reading is not None:
            self.reading.finish()
            report = _saved_report(model)
        else:
            report = self.packing.finish()
            report.seconds = time.perf_counter() - self.start
        self.packing = self.reading = None
        attach(model, report, self.quantization_config.recipe, self, job)
        return model

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        return dequantize_(model, dtype)

    # --- saving ---

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        return True

    def get_state_dict_and_metadata(self, model: Any, *_: Any) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """What transformers' own save_pretrained writes: the same tensors and configuration as save_low_bit."""
        form = saved_form(model, recipe_fields(model))
        model.config.quantization_config = LowBitConfig(form.fields, self.quantization_config.recipe)
        if form.untie:
            model.config.tie_word_embeddings = False
        tensors: dict[str, torch.Tensor] = {}
        for part in parts(model, form):
            tensors |= part.make()
        return tensors, {"format": "pt"}

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def attach(
    model: Any, report: Report, recipe: Recipe | None, quantizer: LowBitQuantizer | None = None, job: Job | None = None
) -> None:
    """Make a model with packed weights one that transformers, peft and Trainer know how to treat."""
    job = job or Job()
    for held in held_weights(model):
        held.weight.compute = job.compute
    prepare_(model, job.kernel)
    finish(model, report, prepare=False)
    model.lowbit_recipe = recipe
    attach_saving(model)
    attach_engine(model)
    form = saved_form(model, recipe_fields(model))
    config = LowBitConfig(form.fields, recipe, job)
    quantizer = quantizer or LowBitQuantizer(config, pre_quantized=True)
    quantizer.quantization_config = config
    model.hf_quantizer = quantizer
    model.config.quantization_config = config
    model.quantization_method = form.method
    # peft asks for a model "loaded in k bits". The flag for four would send `num_parameters` to bitsandbytes, the one
    # for eight does not; `is_quantized` stays off, or transformers would refuse `.half()` and `.float()`, which our
    # layers follow.
    model.is_loaded_in_8bit = True
    model.is_quantized = False
    keep_renamings_only_(model)


def _saved_report(model: Any) -> Report:
    """The report that was saved with a model, or one made from what is there."""
    path = Path(str(getattr(model.config, "_name_or_path", ""))) / REPORT
    if path.is_file():
        report = Report.from_dict(read_json(path))
        there = {held.path for held in held_weights(model)}
        for row in [row for row in report.layers if row.path not in there]:
            report.layers.remove(row)
            size = sum(p.nbytes for p in model.get_submodule(row.path).parameters(recurse=False))
            report.skipped.append(Skipped(row.path, "the folder has it in full precision only", size))
        return report
    report = Report(recipe="unknown")
    for held in held_weights(model):
        if not held.tied_to:
            packed = held.weight.packed()
            before = 2 * int(torch.Size(packed.shape).numel())
            row = LayerReport(
                held.path, held.role, packed.format.name, list(packed.shape), before, packed.nbytes, float("nan")
            )
            report.layers.append(row)
    return report


def dequantize_(model: Any, dtype: torch.dtype | None = None) -> Any:
    """Put dense modules back, of the classes that the model's configuration makes, with the weights unpacked."""
    dtype = dtype or model.dtype
    config = copy.deepcopy(model.config)
    with torch.device("meta"):
        skeleton = type(model)(config)
    for held in held_weights(model):
        path = held.path if not isinstance(held.module, LowBitExperts) else held.path.rpartition(".")[0]
        dense = skeleton.get_submodule(path)
        _fill_(dense, held, dtype)
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, dense.train(held.module.training))
    return model


def _fill_(dense: Any, held: Any, dtype: torch.dtype) -> None:
    weight = held.weight.dense().to(dtype)
    if isinstance(held.module, LowBitExperts):
        name = held.path.rpartition(".")[2]
        value = weight.transpose(-1, -2) if getattr(dense, "is_transposed", False) else weight
        setattr(dense, name, nn.Parameter(value.contiguous()))
        bias = getattr(held.module, f"{name}_bias", None)
        if bias is not None:
            setattr(dense, f"{name}_bias", nn.Parameter(bias.detach().to(dtype)))
        return
    if "embed_scale" in dense._buffers:
        dense.embed_scale = torch.tensor(held.module.scale)
    if isinstance(held.module, LowBitConv):
        weight = weight.view(held.module.weight_shape)
    dense.weight = nn.Parameter((weight.t() if held.module.stands_for == "Conv1D" else weight).contiguous())
    bias = None if isinstance(held.module, LowBitEmbedding) else held.module.bias
    if bias is not None:
        dense.bias = nn.Parameter(bias.detach().to(dtype))
