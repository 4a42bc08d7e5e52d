"""Models that read one thing and write another: text to text, and speech to text, with the whole `generate` of transformers.

    model = OVModelForSpeechSeq2Seq.from_pretrained("whisper-base", export=True, load_in_8bit=True)
    model.generate(features, language="en")

Two graphs: the encoder, and the decoder with its past inside (`stepping`). Files are named as OpenVINO's own tools name them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, Self

import numpy as np
import torch
import transformers
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput
from transformers.models.whisper.generation_whisper import WhisperGenerationMixin

from lowbit.errors import LowbitError, RecipeError
from lowbit.models.past import transformers_name
from lowbit.openvino.base import GraphConfig, check_tokens, copy_graphs
from lowbit.openvino.configs import OVQuantizationMethod, OVWeightQuantizationConfig, Quantization
from lowbit.openvino.examples import example_of
from lowbit.openvino.exporting import compress
from lowbit.openvino.library import halved
from lowbit.openvino.opening import compile_model, infer, read_model
from lowbit.openvino.state_cache import GraphCache
from lowbit.openvino.stepping import trace_decoder
from lowbit.openvino.traced import OVTraced, numbers
from lowbit.openvino.tracing import trace

ENCODER, DECODER = "openvino_encoder_model.xml", "openvino_decoder_model.xml"


class Past(GraphCache):
    """What generate asks of a cache; keys and values are in the request's state."""

    def __init__(self, request: Any) -> None:
        super().__init__()
        self.request, self.length = request, 0
        self.order: torch.Tensor | None = None
        self.is_updated: dict[int, bool] = {}

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self.order = beam_idx if self.order is None else self.order[beam_idx]

    def take_order(self, rows: int) -> Any:
        order = torch.arange(rows) if self.order is None else self.order
        self.order = None
        return order.numpy().astype(np.int32)


class Part:
    """One of the two graphs: `model` is an `openvino.Model` that may be exchanged."""

    def __init__(self, owner: OVModelForSeq2SeqLM, model: Any) -> None:
        self._owner, self._model, self._compiled = owner, model, None

    @property
    def model(self) -> Any:
        return self._model

    @model.setter
    def model(self, graph: Any) -> None:
        self._model, self._compiled = graph, None

    @property
    def compiled(self) -> Any:
        if self._compiled is None:
            self._compiled = compile_model(self._model, self._owner.ov_device, self._owner.ov_config)
        return self._compiled

    def release(self) -> None:
        self._compiled = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        made: Self = copy_graphs(self, memo)
        return made


class Encoder(Part):
    """Called by generate, once for each text or sound."""

    @property
    def main_input_name(self) -> str:
        return str(self._owner.main_input_name)

    # Whisper's generate counts frames by the strides of these.
    conv1 = SimpleNamespace(stride=(1,))
    conv2 = SimpleNamespace(stride=(2,))

    def __call__(self, *values: Any, **named: Any) -> Any:
        return self.forward(*values, **named)

    def forward(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        input_features: Any = None,
        return_dict: bool = True,
        **_: Any,
    ) -> Any:
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "input_features": input_features}
        names = [port.get_any_name() for port in self.model.inputs]
        if isinstance(input_ids, torch.Tensor) and attention_mask is None:
            given["attention_mask"] = torch.ones_like(input_ids)
        missing = [name for name in names if given.get(name) is None]
        if missing:
            raise LowbitError(f"the encoder needs {missing[0]}, and takes {', '.join(names)}")
        arrays = {name: numbers(name, given[name]) for name in names}
        if "input_ids" in arrays:
            check_tokens(arrays["input_ids"], self._owner.config.get_text_config().vocab_size)
        found = infer(self.compiled, arrays)
        return BaseModelOutput(last_hidden_state=torch.from_numpy(found[0].copy()))


class Decoder(Part):
    """Called by the model for some tokens at a time; what was before is in the request."""

    def forward(
        self, request: Any, input_ids: Any, encoder_hidden_states: Any, mask: Any, beam_idx: Any
    ) -> torch.Tensor:
        given = {"input_ids": input_ids, "encoder_hidden_states": encoder_hidden_states.float(), "beam_idx": beam_idx}
        if any("encoder_attention_mask" in port.get_names() for port in self.model.inputs):
            whole = torch.ones(encoder_hidden_states.shape[:2]) if mask is None else mask
            given["encoder_attention_mask"] = whole.long()
        infer(request.infer, {name: np.asarray(value) for name, value in given.items()})
        return torch.from_numpy(request.get_output_tensor(0).data.copy())


class OVModelForSeq2SeqLM(OVTraced, transformers.GenerationMixin):  # type: ignore[misc]  # transformers is not typed
    """Text to text: translation, summaries."""

    auto_model_class = transformers.AutoModelForSeq2SeqLM
    main_input_name = "input_ids"
    graph_name: ClassVar[str] = DECODER

    def __init__(
        self, model: Any, config: Any, *, folder: Path | None = None, compile: bool = True, **keywords: Any
    ) -> None:
        super().__init__(model, config, folder=folder, compile=False, **keywords)
        assert folder is not None, "the encoder lies beside the decoder"
        self.encoder = Encoder(self, read_model(folder, ENCODER))
        self.decoder = Decoder(self, model)
        if compile:
            self.compile()

    @property
    def model(self) -> Any:
        """Itself: its parts are `encoder` and `decoder`, whose `model` is a graph."""
        return self

    @model.setter
    def model(self, graph: Any) -> None:
        raise LowbitError("this model has two graphs: exchange model.encoder.model and model.decoder.model")

    @property
    def graphs(self) -> tuple[Any, ...]:
        return self.encoder.model, self.decoder.model

    def compile(self, *_: Any, **__: Any) -> None:
        _ = self.encoder.compiled, self.decoder.compiled

    def to(self, *places: Any, **named: Any) -> Self:
        before = self.ov_device
        super().to(*places, **named)
        if self.ov_device != before:
            self.clear_requests()
        return self

    def clear_requests(self) -> None:
        self.encoder.release()
        self.decoder.release()

    def half(self) -> Self:
        for part in (self.encoder, self.decoder):
            part.model = halved(part.model)
        return self

    def get_encoder(self, *_: Any) -> Any:
        return self.encoder

    def get_decoder(self) -> Any:
        return self.decoder

    def _to_save(self) -> dict[str, Any]:
        self._graph = self.decoder.model  # it may have been exchanged
        return super()._to_save() | {ENCODER: self.encoder.model}

    @classmethod
    def _graphs(cls, module: Any) -> dict[str, Any]:
        example = example_of(module)
        encoder = module.get_encoder()
        with torch.no_grad():
            hidden = encoder(**example)[0]
        return {
            ENCODER: trace(encoder, example, ["last_hidden_state"]).model,
            DECODER: trace_decoder(module, hidden, example.get("attention_mask")).model,
        }

    @classmethod
    def _asked(cls, quantization: OVWeightQuantizationConfig) -> OVWeightQuantizationConfig:
        looks = (
            quantization.gptq or quantization.scale_estimation or quantization.quant_method == OVQuantizationMethod.AWQ
        )
        if quantization.dataset is not None or looks:
            raise RecipeError(
                "calibration of an encoder-decoder goes through the torch model: pass GPTQConfig or AwqConfig of lowbit, or "
                "compress model.encoder.model and model.decoder.model with a dataset of their own inputs"
            )
        return quantization

    def _compress_(self, asked: Quantization, source: Path, keywords: Mapping[str, Any]) -> None:
        if not isinstance(asked, OVWeightQuantizationConfig):
            raise RecipeError(f"{type(asked).__name__} quantises the original model: export that again")
        for part in (self.encoder, self.decoder):
            part.model = compress(part.model, self._asked(asked), source, keywords)

    def forward(  # type: ignore[override]  # two graphs take more than one does
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        decoder_input_ids: Any = None,
        decoder_attention_mask: Any = None,
        encoder_outputs: Any = None,
        past_key_values: Any = None,
        labels: Any = None,
        return_dict: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        input_features: Any = None,
        cache: Any = None,
        **_: Any,
    ) -> Any:
        """The logits after each token of `decoder_input_ids`, and the past to go on from, which is taken by both of its names."""
        if labels is not None or output_attentions or output_hidden_states:
            raise LowbitError(
                "the graph gives logits alone: leave out labels, output_attentions and output_hidden_states"
            )
        if encoder_outputs is None:
            encoder_outputs = self.encoder(input_ids, attention_mask, input_features)
        if decoder_input_ids is None:
            raise LowbitError("give decoder_input_ids, or call generate, which begins with the model's own first token")
        given = past_key_values if cache is None else cache
        past = given if isinstance(given, Past) else self._past()
        rows, count = decoder_input_ids.shape
        hidden = encoder_outputs[0]
        if decoder_attention_mask is not None and not bool(torch.as_tensor(decoder_attention_mask).all()):
            raise LowbitError("the decoder has one sentence in a row and no padding: call it for rows of one length")
        order = past.take_order(rows)
        logits = self.decoder.forward(past.request, decoder_input_ids, hidden, attention_mask, order)
        past.length += count
        kept = {transformers_name(): past}
        output = Seq2SeqLMOutput(logits=logits, encoder_last_hidden_state=hidden, **kept)
        return output.to_tuple() if return_dict is False else output

    def _past(self) -> Past:
        return Past(self.decoder.compiled.create_infer_request())

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict[str, Any], *_: Any) -> None:
        """Called by generate before its first step."""
        if model_kwargs.get(transformers_name()) is None:
            model_kwargs[transformers_name()] = self._past()


class OVModelForSpeechSeq2Seq(OVModelForSeq2SeqLM, WhisperGenerationMixin):  # type: ignore[misc]  # transformers is not typed
    """Speech to text: Whisper."""

    auto_model_class = transformers.AutoModelForSpeechSeq2Seq
    main_input_name = "input_features"

    def forward(self, input_features: Any = None, attention_mask: Any = None, **named: Any) -> Any:  # type: ignore[override]
        """As above; the encoder hears all of its thirty seconds, whatever a mask says of them."""
        return super().forward(input_features=input_features, **named)


# transformers' pipelines ask which classes are models of their task.
for kind in (OVModelForSeq2SeqLM, OVModelForSpeechSeq2Seq):
    kind.auto_model_class.register(GraphConfig, kind)
