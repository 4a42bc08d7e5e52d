"""A language model in OpenVINO's form with the whole `generate` of transformers.

    model = OVModelForCausalLM.from_pretrained("folder or model", export=True, load_in_8bit=True)
    model.generate(**tokenizer("Once upon a time", return_tensors="pt"), num_beams=4)

`generate` calls `forward` step by step and owns everything else: drawing, beams, streamers, criteria, processors, scores, guesses
by a smaller model. The past stays in the graph's state, and `StateCache` says to generate that it does.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers.modeling_outputs import CausalLMOutputWithPast

from lowbit.errors import LowbitError
from lowbit.models.past import transformers_name
from lowbit.openvino.base import GraphConfig, OVModel, check_tokens
from lowbit.openvino.configs import OVWeightQuantizationConfig, Quantization
from lowbit.openvino.exporting import compress, export_decoder
from lowbit.openvino.native.graph import ask_for_logits
from lowbit.openvino.native.rows import Decoder, Integers, Rows, check_graph
from lowbit.openvino.state_cache import StateCache

# What generate asks for by itself, in one of its releases or another.
_OWN_CACHES = (None, "dynamic", "dynamic_full", "hybrid")


class OVModelForCausalLM(OVModel, transformers.GenerationMixin):  # type: ignore[misc]  # transformers is not typed
    """A decoder in OpenVINO's form."""

    auto_model_class = transformers.AutoModelForCausalLM
    main_input_name = "input_ids"
    writes = "lowbit.openvino.write_decoder(model, folder)"

    @classmethod
    def _write(
        cls,
        source: str | Path,
        folder: Path,
        asked: Quantization | None,
        large_in_8_bits: bool,
        keywords: dict[str, Any],
    ) -> None:
        export_decoder(source, folder, asked, large_in_8_bits=large_in_8_bits, keywords=keywords)

    def _compress_(self, asked: Quantization, source: Path, keywords: Mapping[str, Any]) -> None:
        if not isinstance(asked, OVWeightQuantizationConfig):
            raise LowbitError(
                "this configuration quantises a torch model, and the folder holds a graph: start from the original"
            )
        self.model = compress(self.model, asked, source, keywords)

    def _to_compile(self) -> Any:
        check_graph(self.model)
        graph = self.model.clone()
        ask_for_logits(graph)
        return graph

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: StateCache | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        inputs_embeds: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache: StateCache | None = None,
    ) -> Any:
        """The logits after each token, or after those that `logits_to_keep` names, and the past to go on from.

        The past is taken as `cache=`, its name since transformers 5.24, and as `past_key_values=`, its name before.
        """
        if input_ids is None or inputs_embeds is not None:
            raise LowbitError("the graph takes tokens: give input_ids= instead of inputs_embeds=")
        if output_attentions or output_hidden_states:
            raise LowbitError(
                "the graph gives logits alone: leave out output_attentions= and output_hidden_states=, or ask the original model"
            )
        given = past_key_values if cache is None else cache
        past = self._cache() if given is None else given
        tokens = _tokens(input_ids, self.config.get_text_config().vocab_size)
        mask = _whole_mask(attention_mask, tokens.shape, past.rows.length)
        positions = None if position_ids is None else position_ids.cpu().numpy()
        if positions is None and mask is not None:
            positions = _count(mask)[:, -tokens.shape[1] :]
        wanted = _kept(logits_to_keep, tokens.shape[1])
        found = past.rows.read(tokens, past.take_order(len(tokens)), mask, positions, wanted)
        logits = torch.from_numpy(found)
        loss = None if labels is None else self.loss_function(logits, labels, self.config.get_text_config().vocab_size)
        kept = {transformers_name(): None if use_cache is False else past}
        output = CausalLMOutputWithPast(loss=loss, logits=logits, **kept)
        return output.to_tuple() if return_dict is False else output

    def _cache(self) -> StateCache:
        return StateCache(Rows(Decoder.of(self.model, self.compiled)))

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict[str, Any], *_: Any) -> None:
        """Called by generate before its first step: the past is a state, so a cache of another kind would stay empty."""
        given = model_kwargs.get(transformers_name())
        if given is None and generation_config.use_cache is not False:
            if generation_config.cache_implementation not in _OWN_CACHES:
                raise LowbitError(
                    f"the graph keeps what it has read itself: leave out cache_implementation="
                    f"{generation_config.cache_implementation!r}"
                )
            model_kwargs[transformers_name()] = self._cache()
        elif given is not None and not isinstance(given, StateCache):
            raise LowbitError(
                f"the graph keeps what it has read itself and takes no {type(given).__name__}: pass the {transformers_name()} that "
                "this model returned, or none"
            )


# transformers' pipelines ask which classes are models of their task.
transformers.AutoModelForCausalLM.register(GraphConfig, OVModelForCausalLM)


def _tokens(given: Any, words: int) -> Integers:
    """The tokens of a call."""
    if not isinstance(given, torch.Tensor) or given.dim() != 2 or given.is_floating_point() or not given.shape[1]:
        said = (
            f"{list(given.shape)} of {given.dtype}" if isinstance(given, torch.Tensor) else f"a {type(given).__name__}"
        )
        raise LowbitError(f"input_ids is a tensor of whole numbers [rows, tokens] with a token at least, not {said}")
    tokens: Integers = given.cpu().numpy()
    check_tokens(tokens, words)
    return tokens


def _whole_mask(mask: torch.Tensor | None, shape: tuple[int, ...], length: int) -> Integers | None:
    """The mask over what was read and what is read now; one for the new tokens alone has nothing hidden before them."""
    if mask is None:
        return None
    if mask.dim() != 2:
        raise LowbitError(f"attention_mask has {mask.dim()} axes, and the graph takes [rows, tokens]")
    whole: Integers = mask.cpu().numpy().astype(np.int64)
    if whole.shape[1] == shape[1] and length:
        whole = np.concatenate([np.ones((shape[0], length), np.int64), whole], axis=1)
    if whole.shape != (shape[0], length + shape[1]):
        raise LowbitError(
            f"attention_mask has the shape {list(whole.shape)}, and {length} tokens read before with {shape[1]} new ones in "
            f"{shape[0]} rows need {[shape[0], length + shape[1]]}"
        )
    return whole


def _count(mask: Integers) -> Integers:
    """Positions counted over what is no padding."""
    counted: Integers = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    return counted


def _kept(wanted: int | torch.Tensor, count: int) -> Integers:
    """Which of the new positions are asked for; 0 means all."""
    if isinstance(wanted, torch.Tensor):
        kept: Integers = np.arange(count)[wanted.cpu().numpy()]
        return kept
    return np.arange(count)[-wanted:] if wanted else np.arange(count)
