"""Models that are one call from inputs to outputs: encoders of text and of pictures, with the heads that tasks have.

    model = OVModelForSequenceClassification.from_pretrained("folder or model", export=True, load_in_8bit=True)
    model(**tokenizer("Good.", return_tensors="pt")).logits

The graph comes of a trace of transformers' own module, whose outputs it gives under their names; a class here says no more than
which module that is, and which output class. Low-bit folders arrive with their codes; `load_in_8bit`, `load_in_4bit` and
`quantization_config` round what is in 16 or 32 bits.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import transformers
from transformers import modeling_outputs

from lowbit.checkpoint import auto, hub
from lowbit.checkpoint.companions import copy_companions, travels
from lowbit.configs.base import WeightOnlyConfig
from lowbit.errors import CheckpointError, LowbitError, RecipeError, one_line
from lowbit.models.past import PAST_NAMES
from lowbit.openvino.base import GraphConfig, OVModel, check_tokens
from lowbit.openvino.configs import OVWeightQuantizationConfig, Quantization
from lowbit.openvino.examples import differs, example_of, fixed_for, outputs_of, table_of_positions, takes_positions
from lowbit.openvino.exporting import compress
from lowbit.openvino.folders import make_folder
from lowbit.openvino.library import save
from lowbit.openvino.opening import infer
from lowbit.openvino.recipes import LARGE
from lowbit.openvino.tokenizer import has_tokenizer, write_tokenizers
from lowbit.openvino.tracing import Traced, trace
from lowbit.swap import copy_model

# What a call may name though the graph does not take it: it changes nothing, or names what is always so here.
_IDLE = {"token_type_ids", "use_cache", *PAST_NAMES, "interpolate_pos_encoding"}

# Where a graph says how many tokens its table of positions is for.
_TABLE = ["lowbit", "positions"]
# The ends of transformers' names for what a head does, which are the ends of the classes here too.
_HEADS = (
    "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "ForMaskedLM", "ForImageClassification",
    "ForAudioClassification", "ForCTC",
)  # fmt: skip
# Sounds are classified by heads of two names in transformers.
_CALLED_ALSO = {"ForAudioClassification": "ForSequenceClassification"}


class OVTraced(OVModel):
    """A graph that was traced from one module of transformers."""

    auto_model_class: ClassVar[Any] = transformers.AutoModel
    output_class: ClassVar[Any] = modeling_outputs.BaseModelOutput

    @classmethod
    def _write(
        cls,
        source: str | Path,
        folder: Path,
        asked: Quantization | None,
        large_in_8_bits: bool,
        keywords: dict[str, Any],
    ) -> None:
        cls.export(source, folder, asked, large_in_8_bits=large_in_8_bits, **keywords)

    @classmethod
    def export(
        cls,
        source: Any,
        out: str | Path,
        quantization: Quantization | None = None,
        *,
        large_in_8_bits: bool = True,
        convert_tokenizer: bool = True,
        **keywords: Any,
    ) -> None:
        """Write the graph of a model, given as itself, a folder or a name, and everything beside it into a folder."""
        out = make_folder(out)
        module = load_module(cls.auto_model_class, source, quantization, keywords)
        if quantization is None and large_in_8_bits and count_weights(module) >= LARGE:
            print("lowbit: above 1e9 weights, exported in 8 bits; load_in_8bit=False keeps their type", file=sys.stderr)
            quantization = OVWeightQuantizationConfig(bits=8)
        halves = module.dtype == torch.float16
        graphs = cls._graphs(module.float())
        for name, graph in graphs.items():
            if isinstance(quantization, OVWeightQuantizationConfig) and quantization.of_torch is None:
                graph = compress(graph, cls._asked(quantization), source, keywords)
            save(graph, out / name, halves)
        module.config.architectures = [type(module).__name__]  # the head that the graph has, as transformers saves it
        module.config.save_pretrained(out)
        if module.can_generate() and module.generation_config is not None:
            module.generation_config.save_pretrained(out)
        copy_beside(source, out)
        if convert_tokenizer and has_tokenizer(out):
            for note in write_tokenizers(out):
                print(f"lowbit: {note}", file=sys.stderr)

    @classmethod
    def _check_head(cls, folder: Path, config: Any) -> None:
        named = next(iter(getattr(config, "architectures", None) or ()), "")
        heads = [kind for kind in _HEADS if named.endswith(kind)]
        own = cls.__name__.removeprefix("OVModel")
        if heads and own in _HEADS and own not in heads and _CALLED_ALSO.get(own) not in heads:
            raise CheckpointError(f"{folder} holds the graph of a {named}: open it with OVModel{heads[0]}")

    @classmethod
    def _graphs(cls, module: Any) -> dict[str, Any]:
        """The graphs of a module by the names of their files."""
        graph = trace_model(module).model
        table = table_of_positions(module)
        if table is not None:
            graph.set_rt_info(json.dumps(table), _TABLE)
        return {cls.graph_name: graph}

    @classmethod
    def _asked(cls, quantization: OVWeightQuantizationConfig) -> OVWeightQuantizationConfig:
        """What is asked for, if the class can do it."""
        return quantization

    def _compress_(self, asked: Quantization, source: Path, keywords: Mapping[str, Any]) -> None:
        if not isinstance(asked, OVWeightQuantizationConfig):
            raise RecipeError(
                f"{type(asked).__name__} quantises the original model and this folder holds its graph alone: take "
                "OVWeightQuantizationConfig, or export the original again"
            )
        self.model = compress(self.model, asked, source, keywords)

    def forward(self, *values: Any, return_dict: bool | None = None, **named: Any) -> Any:
        """What the module of torch gives, under the same names."""
        names = [port.get_any_name() for port in self.model.inputs]
        if len(values) > len(names):
            raise LowbitError(f"{len(values)} inputs are given, and the graph takes {', '.join(names)}")
        given = dict(zip(names, values, strict=False)) | {n: v for n, v in named.items() if v is not None}
        if "labels" in given:
            raise LowbitError("the graph gives no loss: call it without labels, or train the original model")
        odd = [name for name in given if name not in names and not _says_nothing(name, given[name])]
        if odd:
            raise LowbitError(f"{odd[0]} is no input of the graph, which takes {', '.join(names)}")
        arrays = {name: numbers(name, given[name]) for name in names if name in given}
        words = getattr(self.config.get_text_config(), "vocab_size", None)
        if "input_ids" in arrays and words is not None:
            check_tokens(arrays["input_ids"], words)
        if "input_ids" in arrays and "position_ids" not in arrays:
            self._check_length(arrays["input_ids"])
        found = infer(self.compiled, _completed(arrays, names))
        tensors = {port.get_any_name(): torch.from_numpy(found[port].copy()) for port in self.compiled.outputs}
        return tuple(tensors.values()) if return_dict is False else self._answer(tensors)

    def _check_length(self, tokens: Any) -> None:
        """Refuse a text that is longer than the table of positions: behind its end a plugin reads anything."""
        if not self.model.has_rt_info(_TABLE):
            return
        longest, unused = json.loads(self.model.get_rt_info(_TABLE).astype(str))
        count = tokens.shape[-1] if unused is None else int((tokens != unused).sum(-1).max(initial=0))
        if count > longest:
            raise LowbitError(
                f"the text has {count} tokens, and the model has places for {longest}: cut it "
                f"(tokenizer(..., truncation=True, max_length={longest}))"
            )

    def _answer(self, tensors: dict[str, torch.Tensor]) -> Any:
        return self.output_class(**tensors)


def numbers(name: str, value: Any) -> Any:
    array = np.asarray(value)
    if array.dtype.kind not in "biuf" or array.ndim == 0:
        raise LowbitError(f"{name} is a tensor of numbers, not a {type(value).__name__}")
    return array


def _says_nothing(name: str, value: Any) -> bool:
    """Whether an argument changes nothing: one of those above, one that is off, a mask that hides nothing."""
    return name in _IDLE or value is False or (name == "attention_mask" and bool(np.all(np.asarray(value) == 1)))


def _completed(arrays: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """Inputs of text that were left out: nothing is hidden, all of it is one sentence, tokens are counted from its beginning."""
    ids = arrays.get("input_ids")
    for name in names:
        if name in arrays:
            continue
        if ids is None or name not in ("attention_mask", "token_type_ids", "position_ids"):
            raise LowbitError(f"the graph needs {name}, and takes {', '.join(names)}")
        if name == "position_ids":
            arrays[name] = np.tile(np.arange(ids.shape[-1]), (len(ids), 1))
        else:
            arrays[name] = np.full_like(ids, name == "attention_mask")
    return arrays


def load_module(kind: Any, source: Any, quantization: Quantization | None, keywords: Mapping[str, Any]) -> Any:
    """The module of torch: dense, low-bit as its folder has it, or quantised by a configuration of lowbit's own."""
    if isinstance(source, torch.nn.Module):
        return copy_model(source).eval()
    config = quantization.of_torch if isinstance(quantization, OVWeightQuantizationConfig) else quantization
    if not isinstance(config, WeightOnlyConfig):
        try:
            return kind.from_pretrained(source, **keywords).eval()
        except (OSError, ValueError, TypeError) as error:
            said = one_line(str(error).partition("\n")[0])
            raise CheckpointError(f"{source} cannot be opened by {kind.__name__} ({said})") from error
    own = getattr(auto, kind.__name__, None)
    if own is None:
        raise RecipeError(
            f"{type(config).__name__} quantises models of text and speech; for {kind.__name__} take OVWeightQuantizationConfig, "
            "or quantise the module with lowbit.optimize_model and trace it"
        )
    return own.from_pretrained(source, quantization_config=config, **keywords).eval()


def trace_model(module: Any) -> Traced:
    """A module of transformers as a graph, compared with it at another size.

    A model that reads in one direction sees nothing where a text begins with padding. Its attention is followed with masks of
    large numbers, which give some average there; those of true and false give what is no number, and no token after it is one.
    """
    if any(getattr(part, "is_causal", False) for part in module.modules()):
        module = copy_model(module)
        module.set_attn_implementation("eager")
    try:
        return _followed(module, positions=False)
    except LowbitError:
        if not takes_positions(module):
            raise
        return _followed(module, positions=True)


def _followed(module: Any, positions: bool) -> Traced:
    inputs, fixed = example_of(module, positions=positions), fixed_for(module)
    outputs = outputs_of(module, inputs, fixed)
    traced = trace(module, inputs, outputs, fixed)
    other = example_of(module, rows=3, tokens=10, positions=positions)
    if "attention_mask" in other:
        other["attention_mask"][0, 6:] = 0
    wrong = differs(traced.model, module, other, fixed, bool(traced.packed))
    if wrong:
        raise LowbitError(
            f"{type(module).__name__} decides by the sizes of its inputs, so that its trace is not the model ({wrong}): "
            "use it through lowbit.optimize_model"
        )
    return traced


def count_weights(module: Any) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.is_floating_point())


def copy_beside(source: Any, out: Path) -> None:
    """Tokenizers, processors, code and licences, from a folder or the copy of a model of the hub that was just fetched."""
    home = Path(source).expanduser() if isinstance(source, str | Path) else None
    if home is not None and not home.is_dir():
        home = hub.home_of(str(source))
        if home is not None:
            hub.fetch_companions(str(source), home, travels)
    if home is not None:
        copy_companions(home, out)


class OVModelForFeatureExtraction(OVTraced):
    """Vectors of what goes in."""

    def _answer(self, tensors: dict[str, torch.Tensor]) -> Any:
        pooled = "pooler_output" in tensors
        kind = modeling_outputs.BaseModelOutputWithPooling if pooled else modeling_outputs.BaseModelOutput
        return kind(**{name: value for name, value in tensors.items() if name in {f.name for f in fields(kind)}})


class OVModelForSequenceClassification(OVTraced):
    """A class for each text."""

    auto_model_class = transformers.AutoModelForSequenceClassification
    output_class = modeling_outputs.SequenceClassifierOutput


class OVModelForTokenClassification(OVTraced):
    """A class for each token."""

    auto_model_class = transformers.AutoModelForTokenClassification
    output_class = modeling_outputs.TokenClassifierOutput


class OVModelForQuestionAnswering(OVTraced):
    """Where in a text the answer begins and ends."""

    auto_model_class = transformers.AutoModelForQuestionAnswering
    output_class = modeling_outputs.QuestionAnsweringModelOutput


class OVModelForMaskedLM(OVTraced):
    """The words behind masks."""

    auto_model_class = transformers.AutoModelForMaskedLM
    output_class = modeling_outputs.MaskedLMOutput


class OVModelForImageClassification(OVTraced):
    """A class for each picture."""

    auto_model_class = transformers.AutoModelForImageClassification
    output_class = modeling_outputs.ImageClassifierOutputWithNoAttention
    main_input_name = "pixel_values"


class OVModelForAudioClassification(OVTraced):
    """A class for each sound."""

    auto_model_class = transformers.AutoModelForAudioClassification
    output_class = modeling_outputs.SequenceClassifierOutput
    main_input_name = "input_values"


class OVModelForCTC(OVTraced):
    """A letter for each moment of speech."""

    auto_model_class = transformers.AutoModelForCTC
    output_class = modeling_outputs.CausalLMOutput
    main_input_name = "input_values"


# transformers' pipelines ask which classes are models of their task.
for kind in (
    OVModelForFeatureExtraction, OVModelForSequenceClassification, OVModelForTokenClassification, OVModelForQuestionAnswering,
    OVModelForMaskedLM, OVModelForImageClassification, OVModelForAudioClassification, OVModelForCTC,
):  # fmt: skip
    kind.auto_model_class.register(GraphConfig, kind)
