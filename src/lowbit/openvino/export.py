"""A model as a folder of OpenVINO's: what `openvino_genai.LLMPipeline` and `OVModelForCausalLM` read.

    written = write_decoder("model or folder or file.gguf", "out", format="int4")

    openvino_model.xml .bin          the graph with its memory inside, and its weights, under the names that others use too
    openvino_tokenizer.xml ...       tokenizer and detokenizer, where openvino-tokenizers is installed
    config.json, generation_config.json, tokenizer files, chat template, licences: as they came with the model
    lowbit_report.json               the format of every weight

Weights that are low-bit already keep their codes; plain ones are rounded where a format is asked for. Two weights
are in memory at a time beside what is written, since one is rounded while the one before is laid down.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

from lowbit.checkpoint.companions import copy_companions
from lowbit.checkpoint.folder import replace_folder
from lowbit.contents import CONFIG, GENERATION_CONFIG, REPORT
from lowbit.errors import RecipeError
from lowbit.formats import Format
from lowbit.models.spec import DecoderSpec
from lowbit.openvino.arena import Arena
from lowbit.openvino.constants import WIDENED
from lowbit.openvino.decoder import build
from lowbit.openvino.groups import fitted
from lowbit.openvino.library import Node, release, save
from lowbit.openvino.opening import MODEL
from lowbit.openvino.recipes import BACKUP, LARGE, export_recipe, with_ratio
from lowbit.openvino.sources import HeldModel, check_generates, has_spec, load_model, needs_torch, open_source, rounded
from lowbit.openvino.spool import Kept
from lowbit.openvino.tokenizer import Conversion, write_tokenizers
from lowbit.packing import PackedTensor
from lowbit.progress import progress
from lowbit.recipe import Recipe
from lowbit.report import LayerReport, Report, Skipped
from lowbit.runtime.files import RECIPE_ROLES, Loaded, ModelFiles, read_spec, read_weights

OV_CONFIG = "openvino_config.json"
# Where a graph says what was done to its weights when it was written.
RECIPE, FORMATS = ["lowbit", "recipe"], ["lowbit", "formats"]
Item = TypeVar("Item")
_ITEM = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class Written:
    """What an export made, and of what. `recipe` is what plain weights were rounded by, None where none was.

    A model that was followed has no spec; it is the `model` itself, low-bit where a format was asked for. `kept` has the weights as
    the recipe rounded them, where they were asked to be kept.
    """

    folder: Path
    spec: DecoderSpec | None
    report: Report
    notes: tuple[str, ...]
    files: ModelFiles
    recipe: Recipe | None = None
    model: Any = None
    kept: Kept | None = None


def write_decoder(
    source: Any,
    out: str | Path,
    format: str | Format | Recipe | None = None,
    *,
    ratio: float | None = None,
    tokenizer: bool = True,
    large_in_8_bits: bool = True,
    keep: bool = False,
) -> Written:
    """Export a decoder. Without a format weights stay as they are; plain ones of a model above 1e9 weights become 8 bits.

    A model of a family that lowbit has no description of is followed for one call instead (other_decoders.py). With `keep` rounded
    weights stay on the disk as long as the result lives, so that `verify` need not round them again.
    """
    started = time.perf_counter()
    check_generates(source)
    if not has_spec(source):
        return _write_followed(source, Path(out).expanduser(), format, ratio, tokenizer, large_in_8_bits)
    files = open_source(source)
    spec = read_spec(files)
    notes: list[str] = []
    recipe = None if format is None else export_recipe(format)
    if recipe is None and large_in_8_bits and not files.is_packed:
        recipe = recipe_by_size(spec)
        if recipe is not None:
            notes.append(
                f"the model has {weight_count(spec) / 1e9:.1f} billion weights and is written in 8 bits; "
                "ask for a format, or for large_in_8_bits=False (--format none), to have another"
            )
    if recipe is not None and needs_torch(recipe):
        files, recipe = rounded(source, recipe), None
    if recipe is not None:
        recipe, said = fitted(recipe, spec, BACKUP)
        notes += said
    if ratio is not None and ratio < 1:
        if recipe is None or recipe.linear.bits == 8:
            raise RecipeError(
                "a ratio is the share of weights in fewer than 8 bits: ask for such a format too, int4 for one"
            )
        recipe = with_ratio(files, spec, recipe, ratio)
    report = Report(recipe=recipe.name if recipe else str(format or "as it was"))
    with replace_folder(Path(out).expanduser()) as folder:
        kept = Kept(folder) if keep and recipe is not None else None
        weights = read_weights(files, spec, recipe)
        if recipe is not None:
            weights = _ahead(weights)
        weights = _reported(weights if kept is None else kept.passing(weights), spec, report)
        _write_texts(files, folder)
        # Tokenizers are converted beside the work of the graph.
        with Conversion(folder) if tokenizer else nullcontext() as conversion:
            notes += _write_graph(files, spec, weights, report, folder)
            notes += conversion.notes() if conversion is not None else []
        write_ov_config(folder, report.recipe, report.formats())
        report.seconds = time.perf_counter() - started
        (folder / REPORT).write_text(report.to_json() + "\n", encoding="utf-8")
    return Written(Path(out).expanduser(), spec, report, tuple(notes), files, recipe, kept=kept)


def _ahead(items: Iterable[Item]) -> Iterator[Item]:
    """The same, each made while the one before is used: rounding takes all cores, and what is done with codes takes one."""
    coming, end = iter(items), object()
    with ThreadPoolExecutor(1, "lowbit-ahead") as beside:
        made: Future[Any] = beside.submit(next, coming, end)
        while (item := made.result()) is not end:
            made = beside.submit(next, coming, end)
            yield item


def _write_graph(
    files: ModelFiles, spec: DecoderSpec, weights: Iterable[Loaded], report: Report, folder: Path
) -> list[str]:
    """The graph of a description over weights as they come; returns what is to be said of them."""
    with Arena(folder / MODEL) as arena:
        model = build(spec, weights, arena)
        files.check()
        describe_(model, report)
        arena.save(model)
        return [*files.notes, *arena.notes, *_remarks(report)]


def _write_followed(
    source: Any, out: Path, format: str | Format | Recipe | None, ratio: float | None, tokenizer: bool, large: bool
) -> Written:
    from lowbit.openvino.other_decoders import trace_causal
    from lowbit.optimize import optimize_model

    if ratio is not None and ratio < 1:
        raise RecipeError(
            "a ratio needs a description of the model, which lowbit has not: write it without a format, and give "
            "lowbit.openvino.compress_weights the graph and the ratio"
        )
    started = time.perf_counter()
    model = load_model(str(source)) if isinstance(source, str | Path) else source
    kind = model.config.model_type
    notes = [f"lowbit has no spec of models of type {kind!r}: the graph is that of a call of {type(model).__name__}"]
    recipe = None if format is None else export_recipe(format)
    if recipe is None and large and sum(p.numel() for p in model.parameters()) > LARGE:
        recipe = export_recipe("int8")
        notes.append(
            "the model has more than a billion weights and is written in 8 bits; ask for a format to have another"
        )
    if recipe is not None:
        model = optimize_model(model, recipe=recipe)
    low_bit: Report | None = getattr(model, "lowbit_report", None)
    # It is followed in float32; what was in 16 bits is written so again.
    halves = low_bit is None and str(model.dtype) == "torch.float16"
    graph, files = trace_causal(model), HeldModel(model)
    report = low_bit or Report(recipe="as it was")
    with replace_folder(out) as folder:
        describe_(graph, report)
        save_graph(graph, folder / MODEL, halves)
        _write_texts(cast(ModelFiles, files), folder)
        write_ov_config(folder, report.recipe, report.formats())
        notes += write_tokenizers(folder) if tokenizer else []
        report.seconds = time.perf_counter() - started
        (folder / REPORT).write_text(report.to_json() + "\n", encoding="utf-8")
    return Written(out, None, report, tuple(notes), cast(ModelFiles, files), recipe, model)


def recipe_by_size(spec: DecoderSpec) -> Recipe | None:
    """8 bits for a large model, nothing for others."""
    return export_recipe("int8") if weight_count(spec) > LARGE else None


def weight_count(spec: DecoderSpec) -> int:
    """The numbers in all weights of a model."""
    inner = (weight for i in range(len(spec.layers)) for weight in spec.layer_weights(i))
    return sum(math.prod(weight.shape) for weights in (spec.outer_weights(), inner) for weight in weights)


def save_graph(model: Node, path: Path, halves: bool = False) -> None:
    """Write a graph and its weights; every constant has the type already that it is to have, but for `halves`."""
    with progress("writing"):
        save(model, path, halves)


def describe_(model: Node, report: Report) -> None:
    """Say in the graph what made it."""
    model.set_rt_info("lowbit", ["lowbit", "writer"])
    model.set_rt_info(report.recipe, RECIPE)
    model.set_rt_info(json.dumps(report.formats()), FORMATS)


def _reported(weights: Iterable[Loaded], spec: DecoderSpec, report: Report) -> Iterator[Loaded]:
    """The weights as they come, with a line for each."""
    for loaded in weights:
        described, weight = spec.weight(loaded.role), loaded.weight
        assert described is not None
        path = described.name.format(layer=loaded.layer).removesuffix(".weight")
        count = math.prod(weight.shape)
        if isinstance(weight, PackedTensor):
            role, name = RECIPE_ROLES.get(loaded.role, loaded.role), weight.format.name
            report.layers.append(LayerReport(path, role, name, list(weight.shape), 2 * count, weight.nbytes, math.nan))
        elif loaded.role in RECIPE_ROLES:
            report.skipped.append(Skipped(path, f"it stays {weight.dtype}", count * _ITEM[weight.dtype]))
        else:
            report.other_weights += 1
            report.other_bytes += weight.array.nbytes
        yield loaded


def _remarks(report: Report) -> list[str]:
    """What the formats mean for speed."""
    wide = sorted(name for name in report.formats() if any(name.startswith(kind) for kind in _WIDENED_FORMATS))
    if not wide:
        return []
    return [
        f"{', '.join(wide)} is kept bit for bit, and widened by OpenVINO's plugins at every inference: int8 is faster there"
    ]


_WIDENED_FORMATS = tuple(f"fp8_{kind.removeprefix('f8')}" for kind in WIDENED)


def _write_texts(files: ModelFiles, folder: Path) -> None:
    if files.path.exists():
        copy_companions(files.path, folder)
    _write_json(folder / CONFIG, files.config)
    if files.generation_config:
        _write_json(folder / GENERATION_CONFIG, files.generation_config)


def write_ov_config(folder: Path, recipe: str, formats: Mapping[str, int]) -> None:
    """What was done to the weights, for whoever looks into the folder."""
    _write_json(folder / OV_CONFIG, {"lowbit": {"recipe": recipe, "formats": formats}, "openvino": release()})


def _write_json(path: Path, fields: dict[str, Any]) -> None:
    path.write_text(json.dumps(fields, indent=1) + "\n", encoding="utf-8")
