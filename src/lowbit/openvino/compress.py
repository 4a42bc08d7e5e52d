"""Weight compression of any `openvino.Model`, ours or another's, in memory or read from disk, by lowbit's own rounding.

    model = compress_weights(model, mode=CompressWeightsMode.INT4_SYM, group_size=128, ratio=0.8)

Products get the mode. Embeddings, convolutions and the last product get the backup (8 bits, a scale for each row) unless
`all_layers`, and so do those of the other products whose rounding hurts most, as many as leave at least the share `ratio` of the
weights to the mode. Which they are is found exactly: of all such choices the one with the least sum of errors
(`allocate`), where the error of a weight is |w - w^|^2 / |w|^2, or with a dataset what `sensitivity_metric` says.

Codes come from `grid.quantize`, whose scales are searched; with a dataset each input weighs as much as its mean square, or GPTQ
rounds column after column, behind AWQ's scales or without (`scaling`). Tables of numbers are `codebooks`. The model that is given
stays as it was. What became of every weight is in `compression_report`.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lowbit.algorithms.gptq import round_gptq
from lowbit.algorithms.rtn import importance_of, relative_error, round_weight
from lowbit.allocate import stored_bytes
from lowbit.errors import RecipeError
from lowbit.formats import PER_CHANNEL, Format
from lowbit.grid import check_finite, unpack
from lowbit.openvino.activations import Seen, collect
from lowbit.openvino.codebooks import Codebook, codebook_of, place
from lowbit.openvino.constants import hold
from lowbit.openvino.groups import fitting, remark
from lowbit.openvino.modes import (
    MODES,
    TABLES,
    AdvancedCompressionParameters,
    BackupMode,
    CompressWeightsMode,
    Dataset,
    GroupSizeFallbackMode,
    IgnoredScope,
    SensitivityMetric,
    as_member,
    backup_format,
    format_in_groups,
    is_8_bit,
)
from lowbit.openvino.recipes import beyond_ratio
from lowbit.openvino.scaling import ROWS, Factors, scale_inputs_
from lowbit.openvino.sites import Site, find_sites, low_bit_weights
from lowbit.openvino.weights import weight_output
from lowbit.options import GptqOptions
from lowbit.packing import PackedTensor
from lowbit.report import LayerReport, Report, Skipped

# What a weight is rounded to.
Rounding = Format | Codebook
_PLACE = ["lowbit", "weight_compression", "report"]
_MATRIX = 2
_LEAST = 1e-30  # of a weight's size, so that one of zeros has no error
_BYTE = 8
_PLAIN_BYTES = 2  # of a weight in f16, as models are saved


@dataclass(frozen=True)
class _Request:
    """What was asked for, checked."""

    mode: CompressWeightsMode
    ratio: float
    group_size: int
    ignored: IgnoredScope
    all_layers: bool
    metric: SensitivityMetric
    backup: Format | None
    gptq: bool
    weighted: bool
    advanced: AdvancedCompressionParameters
    book: Codebook | None = None
    awq: bool = False

    def format_for(self, in_features: int) -> Rounding | None:
        """What the mode makes of rows of a width; None where no group size divides them."""
        row = MODES[self.mode]
        free = self.advanced.group_size_fallback_mode is GroupSizeFallbackMode.ADJUST and not row.sizes_fixed
        size = fitting(self.group_size, in_features, self.advanced.min_adjusted_group_size if free else self.group_size)
        if size is None or self.book is None:
            return None if size is None else format_in_groups(row.format, size)
        return self.book.with_group(size)


def compress_weights(
    model: Any,
    mode: CompressWeightsMode | str = CompressWeightsMode.INT8_ASYM,
    ratio: float | None = None,
    group_size: int | None = None,
    ignored_scope: IgnoredScope | None = None,
    all_layers: bool | None = None,
    dataset: Dataset | Iterable[Any] | None = None,
    sensitivity_metric: SensitivityMetric | str | None = None,
    *,
    subset_size: int = 128,
    awq: bool | None = None,
    scale_estimation: bool | None = None,
    gptq: bool | None = None,
    lora_correction: bool | None = None,
    backup_mode: BackupMode | str | None = None,
    compression_format: Any = None,
    advanced_parameters: AdvancedCompressionParameters | None = None,
) -> Any:
    """A copy of an `openvino.Model` with low-bit weights. The module's text says which weights get what."""
    if not hasattr(model, "get_ordered_ops"):
        raise RecipeError(
            f"compress_weights takes an openvino.Model, not a {type(model).__name__}: a torch module becomes low-bit by "
            "lowbit.optimize_model, and its codes are kept when it is exported"
        )
    _refuse(lora_correction, compression_format)
    if dataset is None and (scale_estimation or gptq or awq):
        raise RecipeError(
            f"{'gptq' if gptq else 'awq' if awq else 'scale_estimation'} rounds by what the model is given: pass a dataset, "
            "nncf.Dataset or any iterable of the model's inputs"
        )
    chosen = as_member(CompressWeightsMode, mode)
    row = MODES[chosen]
    metric = as_member(SensitivityMetric, sensitivity_metric or _default_metric(dataset))
    if dataset is None and metric is not SensitivityMetric.WEIGHT_QUANTIZATION_ERROR:
        raise RecipeError(f"the metric {metric.value} looks at activations: pass a dataset, or leave the metric out")
    request = _Request(
        chosen,
        _checked_ratio(chosen, ratio),
        _checked_size(chosen, group_size),
        ignored_scope or IgnoredScope(),
        bool(all_layers),
        metric,
        backup_format(row.backup if backup_mode is None else as_member(BackupMode, backup_mode)),
        bool(gptq),
        scale_estimation is not False,
        advanced := advanced_parameters or AdvancedCompressionParameters(),
        codebook_of(chosen, advanced) if chosen in TABLES else None,
        bool(awq),
    )
    if request.awq and (request.book is not None or is_8_bit(chosen)):
        raise RecipeError(
            f"awq is for few bits with numbers that stand evenly, or NF4's: leave it out with {chosen.name}"
        )
    if request.gptq and request.book is not None:
        raise RecipeError(f"gptq rounds to numbers that stand evenly, or to NF4's: leave it out with {chosen.name}")
    # NNCF's own class is understood too, by what it can do.
    items: Any = getattr(dataset, "get_inference_data", lambda: dataset)()
    return _compress(model.clone(), request, items, subset_size)


def is_compressed(model: Any) -> bool:
    """Whether `compress_weights` has worked on a model."""
    return bool(model.has_rt_info(_PLACE))


def compression_report(model: Any) -> Report:
    """What `compress_weights` did to a model, also after it was saved and read."""
    if not is_compressed(model):
        raise RecipeError("this model was not compressed by lowbit.openvino.compress_weights")
    return Report.from_dict(json.loads(model.get_rt_info(_PLACE).astype(str)))


def _refuse(lora_correction: bool | None, compression_format: Any) -> None:
    if lora_correction:
        raise RecipeError(
            "lora_correction adds two products to every layer at each inference: gptq=True wins more in the same bits, "
            "and scale_estimation=True costs nothing at inference"
        )
    name = str(getattr(compression_format, "value", compression_format or "dequantize"))
    if name != "dequantize":
        raise RecipeError(f"compression_format {name} is for training in NNCF: lowbit trains adapters on torch models")


def _default_metric(dataset: Any) -> SensitivityMetric:
    return (
        SensitivityMetric.WEIGHT_QUANTIZATION_ERROR if dataset is None else SensitivityMetric.HESSIAN_INPUT_ACTIVATION
    )


def _checked_ratio(mode: CompressWeightsMode, ratio: float | None) -> float:
    if ratio is None:
        return 1.0
    if is_8_bit(mode) and ratio != 1:
        raise RecipeError(
            f"a ratio is the share of 4-bit weights and {mode.name} has none: leave it out, or take INT4_SYM"
        )
    if not 0 <= ratio <= 1:
        raise RecipeError(f"a ratio of {ratio}; it is a share of the weights, from 0 to 1")
    return float(ratio)


def _checked_size(mode: CompressWeightsMode, group_size: int | None) -> int:
    row = MODES[mode]
    if group_size is None or group_size == row.group_size:
        return row.group_size
    if row.sizes_fixed:
        raise RecipeError(f"{mode.name} has groups of {row.group_size}, -1 for a whole row: leave group_size out")
    if group_size < 1 and group_size != PER_CHANNEL:
        raise RecipeError(f"a group size of {group_size}; it is positive, or -1 for one scale a row")
    return group_size


def _compress(model: Any, request: _Request, data: Iterable[Any] | None, subset_size: int) -> Any:
    report = Report(recipe=f"compress_weights {request.mode.value}")
    held = low_bit_weights(model)
    sites = [site for site in find_sites(model) if not _left_out(site, request, report)]
    first = _ratio_defining(sites, request)
    if held and not first:
        raise RecipeError(
            f"{len(held)} weights of this model are low-bit already and are not rounded twice: start from one in 16 or 32 "
            "bits (from_pretrained(..., export=True, load_in_8bit=False))"
        )
    rows = ROWS if request.awq else 0
    seen = {} if data is None else collect(model, first, data, subset_size, request.gptq, rows)
    formats = _choose_formats(sites, first, request, seen)
    factors = Factors()
    if request.awq:
        small = [site for site in first if (format := formats[site.name]) is not None and format.bits < _BYTE]
        factors = scale_inputs_(small, formats, seen)
        seen = seen | {name: seen[name].divided(scale) for name, scale in factors.inputs.items()}
    for site in sites:
        format = formats.get(site.name)
        if format is None:
            report.skipped.append(Skipped(site.name, "no backup was asked for", 4 * site.count))
        else:
            _replace_(site, format, request, seen.get(site.name), report, factors)
    report.skipped += [Skipped(name, "it is low-bit already") for name in held]
    model.validate_nodes_and_infer_types()
    model.set_rt_info(json.dumps(report.to_dict()), _PLACE)
    return model


def _left_out(site: Site, request: _Request, report: Report) -> bool:
    """Whether a weight stays as it is, with a line that says why."""
    operations = [use.operation for use in site.uses]
    names = {site.name, site.constant.get_friendly_name(), *(o.get_friendly_name() for o in operations)}
    reason = ""
    if request.ignored.holds(names, (o.get_type_name() for o in operations)):
        reason = "ignored_scope names it"
    elif len(site.shape) > _MATRIX and site.role != "linear":
        reason = "it has more than two axes"
    elif request.backup is not None and stored_bytes(request.backup, site.shape) >= _PLAIN_BYTES * site.count:
        reason = "its rows are so short that their scales take what codes save"
    if reason:
        report.skipped.append(Skipped(site.name, reason, 4 * site.count))
    return bool(reason)


def _ratio_defining(sites: list[Site], request: _Request) -> list[Site]:
    """The weights that may have the mode: products, all but the last of the model unless all layers are asked for."""
    if is_8_bit(request.mode) or request.all_layers:
        return sites if is_8_bit(request.mode) else [site for site in sites if site.role != "conv"]
    products = [site for site in sites if any(use.role == "linear" for use in site.uses)]
    products.sort(key=lambda site: max(use.place for use in site.uses if use.role == "linear"))
    return [site for site in products[:-1] if site.role == "linear"]


def _choose_formats(
    sites: list[Site], first: list[Site], request: _Request, seen: Mapping[str, Seen]
) -> dict[str, Rounding | None]:
    """The format of every weight by name; None leaves it as it is."""
    formats: dict[str, Rounding | None] = {site.name: request.backup for site in sites}
    wanted = {site.name: request.format_for(site.shape[-1]) for site in first}
    odd = [site.name for site in first if wanted[site.name] is None]
    if odd and request.advanced.group_size_fallback_mode is GroupSizeFallbackMode.ADJUST:
        least = request.advanced.min_adjusted_group_size
        warnings.warn(remark(request.group_size, odd, len(first), least), stacklevel=4)
    if request.advanced.group_size_fallback_mode is GroupSizeFallbackMode.ERROR:
        odd = [f"{site.name} {list(site.shape)}" for site in first if wanted[site.name] is None]
        if odd:
            raise RecipeError(
                f"groups of {request.group_size} do not divide {', '.join(odd[:4])}{' and more' if len(odd) > 4 else ''}: "
                "take another group_size, -1, or GroupSizeFallbackMode.ADJUST"
            )
    may = [site for site in first if wanted[site.name] is not None]
    if request.ratio == 1:
        return formats | {site.name: wanted[site.name] for site in may}
    errors = {}
    for site in may:
        weight = torch.from_numpy(site.read())
        first_choice, second = (
            error_of(weight, format, request, seen.get(site.name)) for format in (wanted[site.name], request.backup)
        )
        errors[site.name] = (first_choice, second)
    kept = beyond_ratio({site.name: site.count for site in may}, errors, request.ratio)
    return formats | {site.name: wanted[site.name] for site in may if site.name not in kept}


def error_of(weight: torch.Tensor, format: Rounding | None, request: _Request, seen: Seen | None) -> float:
    """What rounding costs a product by the metric of the request, so that weights of all layers compare."""
    if format is None:
        return 0.0
    weight = weight.reshape(-1, weight.shape[-1])
    rounded = place(weight, format).restored() if isinstance(format, Codebook) else unpack(round_weight(weight, format))
    change = (rounded - weight).square().sum(0)
    square = weight.square().sum(0)
    metric, factor = request.metric, 1.0
    if seen is not None and metric is not SensitivityMetric.WEIGHT_QUANTIZATION_ERROR:
        if metric is SensitivityMetric.HESSIAN_INPUT_ACTIVATION:
            change, square = (each * seen.statistics.mean_square for each in (change, square))
        else:
            factor = _FACTORS[metric](seen)
    whole = float(square.sum())
    return factor * float(change.sum()) / whole if whole else 0.0


_FACTORS = {
    SensitivityMetric.MEAN_ACTIVATION_VARIANCE: lambda seen: float(seen.variance.mean()),
    SensitivityMetric.MAX_ACTIVATION_VARIANCE: lambda seen: float(seen.variance.max()),
    SensitivityMetric.MEAN_ACTIVATION_MAGNITUDE: lambda seen: float(seen.statistics.mean_size.mean()),
}


def _replace_(
    site: Site, format: Rounding, request: _Request, seen: Seen | None, report: Report, factors: Factors
) -> None:
    """Round one weight and put it in its place, with a line in the report."""
    weight = factors.applied(site.name, torch.from_numpy(site.read()))
    check_finite(weight, site.name)
    before = site.constant.get_element_type().size * site.count
    if isinstance(format, Codebook):
        known = seen is not None and not seen.statistics.is_blank and request.weighted
        placed = place(weight, format, importance_of(seen.statistics) if seen is not None and known else None)
        site.replace_(placed.output(site.name))
        error = float((placed.restored() - weight).norm() / weight.norm().clamp_min(_LEAST))
        found = (placed.nbytes, error, placed.note)
    else:
        packed = _round(weight, format, request, seen)
        held = hold(packed)
        site.replace_(weight_output(held, site.name))
        notes = [note for note in (held.note, factors.notes.get(site.name)) if note]
        found = (packed.nbytes, relative_error(weight, packed), "; ".join(notes))
    size, error, note = found
    report.layers.append(
        LayerReport(site.name, site.role, format.name, list(site.shape), before, size, error, note=note)
    )


def _round(weight: torch.Tensor, format: Format, request: _Request, seen: Seen | None) -> PackedTensor:
    if seen is None or seen.statistics.is_blank or weight.dim() > _MATRIX:
        return round_weight(weight, format)
    if request.gptq and format.bits < _BYTE:
        options = GptqOptions(damping=request.advanced.gptq_params.damp_percent, correction=0.0)
        return round_gptq(weight, format, seen.statistics, options).packed
    return round_weight(weight, format, importance=importance_of(seen.statistics) if request.weighted else None)
