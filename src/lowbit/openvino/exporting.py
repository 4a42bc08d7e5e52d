"""From a model and what is asked of its weights to a folder of OpenVINO's: the way of `from_pretrained(export=True)` and of
`optimum-cli export openvino`.

    nothing, or what weights say of themselves     written as they are read, one at a time (export.write_decoder)
    what needs the torch model (AWQ, GPTQ, TEQ, AutoRound)     quantised by lowbit first, whose codes are then written
    a model without a spec                         followed in torch first (other_decoders), its graph compressed then
    what needs the whole graph (a dataset, exceptions, other metrics)     written in its own type, then compress_weights
"""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from lowbit.calibration import Calibration, calibration_from
from lowbit.checkpoint.auto import AutoModelForCausalLM
from lowbit.checkpoint.hub import find_model
from lowbit.configs.base import WeightOnlyConfig
from lowbit.contents import CONFIG, REPORT, quantization_config, read_config
from lowbit.errors import RecipeError
from lowbit.openvino.comparison import Verification, rounding_of
from lowbit.openvino.comparison import verify as compare
from lowbit.openvino.compress import compress_weights, compression_report
from lowbit.openvino.configs import OVQuantizationMethod, OVWeightQuantizationConfig, Quantization
from lowbit.openvino.configs import read_config as read_quantization
from lowbit.openvino.export import Written, write_decoder
from lowbit.openvino.folders import replace_graph, tell_what_was_done
from lowbit.openvino.opening import MODEL, read_model
from lowbit.openvino.recipes import LARGE
from lowbit.openvino.sources import check_generates, has_spec

_ANY_TEXT, _DEFAULT_TEXT = "auto", "default"
_WINDOWS, _LENGTH = 32, 256
_TOKENS = "input_ids"
_DYNAMIC_QUANTIZATION = ("runtime_options", "DYNAMIC_QUANTIZATION_GROUP_SIZE")


def quantization_asked(load_in_8bit: bool | None, load_in_4bit: bool | None, config: Any) -> Quantization | None:
    """What the keywords of a `from_pretrained` ask for; None for nothing."""
    asked = [
        name for name, given in (("load_in_8bit", load_in_8bit), ("load_in_4bit", load_in_4bit), ("quantization_config", config))
        if given
    ]  # fmt: skip
    if len(asked) > 1:
        raise RecipeError(f"{' and '.join(asked)} ask for two things: leave one out")
    if load_in_8bit:
        return OVWeightQuantizationConfig(bits=8)
    if load_in_4bit:
        return OVWeightQuantizationConfig(bits=4)
    return None if config is None else read_quantization(config)


def export_decoder(
    source: str | Path,
    out: str | Path,
    quantization: Quantization | None = None,
    *,
    large_in_8_bits: bool = True,
    tokenizer: bool = True,
    keywords: Mapping[str, Any] | None = None,
    verify: bool = False,
) -> Verification | None:
    """Write a language model; what was decided on the way is printed. `keywords` are those of transformers' from_pretrained.

    With `verify` it is compared with its source. Where the whole graph is rounded that is done before, and what the rounding moves
    is measured behind it.
    """
    config = quantization.of_torch if isinstance(quantization, OVWeightQuantizationConfig) else quantization
    check_generates(source)
    described = has_spec(source, keywords)
    if isinstance(config, WeightOnlyConfig):
        found = _write(_quantized(source, config, keywords), out, verify, tokenizer=tokenizer)[1]
        _note_dynamic_groups(out, quantization)
        return found
    held = AutoModelForCausalLM.from_pretrained(source, **(keywords or {})) if keywords or not described else source
    if not described and quantization is None and large_in_8_bits and _is_large(held):
        _tell(["the model has more than a billion weights and is written in 8 bits; load_in_8bit=False keeps them"])
        quantization = OVWeightQuantizationConfig(bits=8)
    asked = quantization if isinstance(quantization, OVWeightQuantizationConfig) else None
    recipe = asked.recipe if asked is not None and described else None
    if recipe is not None:
        assert asked is not None
        ratio = asked.ratio if asked.ratio < 1 else None
        found = _write(held, out, verify, format=recipe, ratio=ratio, tokenizer=tokenizer)[1]
    else:
        eight = described and large_in_8_bits and asked is None
        written, found = _write(held, out, verify, tokenizer=tokenizer, large_in_8_bits=eight)
        if asked is not None:
            graph = compress(read_model(out), asked, source, keywords)
            replace_graph(graph, Path(out) / MODEL)
            tell_what_was_done(graph, Path(out))
            (Path(out) / REPORT).write_text(compression_report(graph).to_json() + "\n", encoding="utf-8")
            found = None if found is None else replace(found, rounding=rounding_of(written))
    _note_dynamic_groups(out, asked)
    return found


def _write(source: Any, out: str | Path, verify: bool, **wishes: Any) -> tuple[Written, Verification | None]:
    """A folder, and how it compares with its source."""
    written = write_decoder(source, out, keep=verify, **wishes)
    _tell(written.notes)
    return written, compare(written) if verify else None


def _note_dynamic_groups(out: str | Path, asked: Quantization | None) -> None:
    """Say in the graph how many inputs share a scale where the plugin rounds them."""
    if isinstance(asked, OVWeightQuantizationConfig) and asked.dq_group_size is not None:
        graph = read_model(out)
        graph.set_rt_info(str(asked.dq_group_size), list(_DYNAMIC_QUANTIZATION))
        replace_graph(graph, Path(out) / MODEL)


def _quantized(source: str | Path, config: WeightOnlyConfig, keywords: Mapping[str, Any] | None) -> Any:
    home = find_model(source, keywords or {}).path
    if (home / CONFIG).is_file() and quantization_config(read_config(home)):
        raise RecipeError(
            f"{home} is low-bit already: make it low-bit anew from the original model, or leave out {type(config).__name__}"
        )
    named = getattr(config, "tokenizer", None)
    if config.to_recipe().asks_for_data and (named is None or isinstance(named, str)):
        config = copy.copy(config)
        vars(config)["tokenizer"] = _tokenizer(named or source, keywords)
    return AutoModelForCausalLM.from_pretrained(source, quantization_config=config, **(keywords or {}))


def _is_large(model: Any) -> bool:
    low_bit = getattr(model, "lowbit_report", None) is not None
    return not low_bit and sum(parameter.numel() for parameter in model.parameters()) > LARGE


def compress(
    graph: Any, config: OVWeightQuantizationConfig, source: str | Path, keywords: Mapping[str, Any] | None = None
) -> Any:
    """A graph with the weights that a configuration asks for; `source` has the tokenizer of its text."""
    looks = config.gptq or config.scale_estimation or config.quant_method == OVQuantizationMethod.AWQ
    if config.dataset is None and not looks:
        return compress_weights(graph, **config.arguments)
    names = {port.get_any_name() for port in graph.inputs}
    if _TOKENS not in names:
        wish = "a dataset" if config.dataset is not None else "gptq, awq or scale_estimation"
        raise RecipeError(
            f"{wish} looks at what a graph is given, and lowbit makes inputs of text alone, which this graph does not take (it "
            f"takes {', '.join(sorted(names))}): leave it out, or open the folder as it is and give "
            "compress_weights(model.model, dataset=[...]) inputs of your own"
        )
    named = isinstance(config.dataset, str) and not Path(config.dataset).expanduser().is_file()
    tokenizer = config.tokenizer if config.tokenizer is not None else _tokenizer(source, keywords)
    if isinstance(tokenizer, str | Path):
        tokenizer = _tokenizer(tokenizer, keywords)
    if named and config.dataset not in (_ANY_TEXT, _DEFAULT_TEXT):
        warnings.warn(
            f"the data set {config.dataset} lies on the hub and is not fetched: calibrated on lowbit's default text instead; "
            "give a text file or a list of texts like what the model will read",
            stacklevel=3,
        )
    text = _DEFAULT_TEXT if named or config.dataset is None else config.dataset
    calibration = calibration_from(text, tokenizer, config.num_samples or _WINDOWS, _LENGTH)
    return compress_weights(graph, dataset=list(_inputs(calibration)), **config.arguments)


def _inputs(calibration: Calibration) -> Iterator[dict[str, Any]]:
    """The windows as inputs of the graph."""
    for window in calibration.tokens.numpy():
        tokens = window[None].astype(np.int64)
        positions = np.arange(tokens.shape[1])[None]
        yield {
            "input_ids": tokens,
            "attention_mask": np.ones_like(tokens),
            "position_ids": positions,
            "beam_idx": np.zeros(1, np.int32),
        }


def _tokenizer(source: str | Path, keywords: Mapping[str, Any] | None) -> Any:
    import transformers  # its tokenizers are asked for by few configurations

    trusted = bool((keywords or {}).get("trust_remote_code"))
    return transformers.AutoTokenizer.from_pretrained(source, trust_remote_code=trusted)


def _tell(notes: Sequence[str]) -> None:
    for note in notes:
        print(f"lowbit: {note}", file=sys.stderr)
