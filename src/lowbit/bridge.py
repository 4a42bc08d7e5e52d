"""`model.generate(...)` of a transformers model, answered by the engine where it can answer.

The layers of a low-bit model hold their weights in the form that the engine reads, so the engine is given their addresses: nothing
is copied and nothing is loaded again. `EngineGenerate` stands as `generate` on one model. Each call is looked at once: `refusal`
gives the reason why transformers' own loop must run it (a keyword the engine does not know, hooks, adapters, another device), or
None. Greedy output is the same token for token, up to the last bits of float arithmetic; draws come from the engine's generator,
seeded from torch's, so `torch.manual_seed` still repeats a text.

    lowbit.explain(model).generate      which of the two runs a plain call, and why
"""

from __future__ import annotations

import copy
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from lowbit.errors import LowbitError
from lowbit.kernels.cpu_rows import DTYPE_NAMES, PREPARED
from lowbit.layers import LowBitEmbedding, LowBitExperts, LowBitLinear, PackedWeight
from lowbit.models.families import spec_from_config
from lowbit.models.spec import DecoderSpec, Located
from lowbit.runtime.abi import PREPARED as PREPARED_KIND
from lowbit.runtime.engine import Engine
from lowbit.runtime.selection import Selection, Selector
from lowbit.runtime.weights import MATRIX_ROLES, EngineWeights, Floats, Matrix, plain

SHORTEST_CONTEXT = 512
# What transformers merges into a GenerationConfig and the engine honours, or may ignore since it changes no token.
_HONOURED = {
    "do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty", "min_length", "min_new_tokens",
    "max_length", "max_new_tokens", "eos_token_id", "bos_token_id", "pad_token_id", "bad_words_ids", "use_cache",
    "transformers_version", "_from_model_config", "disable_compile",
}  # fmt: skip
# What must have this value, or be unset.
_REQUIRED = {
    "num_beams": 1, "num_return_sequences": 1, "return_dict_in_generate": False, "output_scores": False, "output_logits": False,
    "output_attentions": False, "output_hidden_states": False, "renormalize_logits": False, "remove_invalid_values": False,
    "cache_implementation": None,
}  # fmt: skip
# Settings that say how a feature works which is off without another setting.
_IDLE = {
    "num_beam_groups": 1, "early_stopping": False, "length_penalty": 1.0, "diversity_penalty": 0.0, "token_healing": False,
    "encoder_repetition_penalty": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0, "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0, "low_memory": False, "is_assistant": False, "num_assistant_tokens": 20,
    "num_assistant_tokens_schedule": "constant", "assistant_confidence_threshold": 0.4, "assistant_lookbehind": 10,
    "target_lookbehind": 10, "guidance_scale": None, "top_h": None,
}  # fmt: skip
_FORWARDED = {"attention_mask", "use_cache", "logits_to_keep", "cache_position", "position_ids"}


class EngineGenerate:
    """Stands as `generate` on one model: the engine where it can, transformers' own loop elsewhere."""

    def __init__(self, model: nn.Module, cache: str = "fp16") -> None:
        self.model, self.cache = model, cache
        self.why_not: str | None = None
        self._engine: Engine | None = None
        self._state: list[tuple[int, int]] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> EngineGenerate:
        return EngineGenerate(copy.deepcopy(self.model, memo), self.cache)

    def __reduce__(self) -> tuple[Any, ...]:
        return (EngineGenerate, (self.model, self.cache))

    @torch.no_grad()
    def __call__(self, inputs: Any = None, generation_config: Any = None, **kwargs: Any) -> Any:
        model = cast(Any, self.model)
        own = type(model).generate
        ids = kwargs.get("input_ids", inputs)
        streamer = kwargs.get("streamer")
        extra = {k: v for k, v in kwargs.items() if k not in ("input_ids", "streamer") and v is not None}
        self.why_not = _input_refusal(ids, extra)
        if self.why_not is None:
            config, rest = model._prepare_generation_config(generation_config, **extra)
            self.why_not = _config_refusal(config, rest) or self.model_refusal()
        if self.why_not is not None:
            return own(model, inputs, generation_config, **kwargs)
        return self._generate(ids, config, streamer)

    def model_refusal(self) -> str | None:
        """Why the engine cannot run this model as it is now, or None."""
        model = cast(Any, self.model)
        if model.training:
            return "the model is in training mode; call model.eval()"
        for name, module in model.named_modules():
            if module._forward_hooks or module._forward_pre_hooks:
                return f"{name or 'the model'} has forward hooks, which the engine would pass by"
        # Where every tensor lies and how often it was written to: an engine made for another state would answer from the past.
        state = [(t.data_ptr(), t._version) for t in (*model.parameters(), *model.buffers())]
        if state != self._state:
            self.close()
            try:
                self._parts = model_weights(model)
            except LowbitError as error:
                return str(error)
            self._state = state
        return None

    def close(self) -> None:
        """Let the engine and its cache go; the next call makes another."""
        if self._engine is not None:
            self._engine.close()
        self._engine, self._state = None, []

    def engine(self, length: int) -> Engine:
        """The engine over this model's weights, with room for a sequence of `length`."""
        if self._engine is None or self._engine.context < length:
            if self._engine is not None:
                self._engine.close()  # its weights stay, they are the model's
            context = max(SHORTEST_CONTEXT, 1 << (length - 1).bit_length())
            self._engine = Engine(*self._parts, context=context, cache=self.cache, compute=self._compute())
        self._engine.reset()
        return self._engine

    def _compute(self) -> str:
        exact = all(w.compute == "fp32" for w in self.model.modules() if isinstance(w, PackedWeight))
        return "fp32" if exact else "auto"

    def _generate(self, ids: torch.Tensor, config: Any, streamer: Any) -> torch.Tensor:
        prompt = ids[0].numpy().astype(np.int32)
        limit = _new_tokens(config, len(prompt))
        stops = _as_tuple(config.eos_token_id)
        selection = _selection(config, len(prompt))
        if streamer is not None:
            streamer.put(ids)
        engine = self.engine(len(prompt) + limit)
        tokens = prompt.tolist()
        if selection == Selection() and streamer is None:
            tokens += engine.generate(prompt, limit, stops)
        else:
            self._choose(engine, tokens, limit, Selector(selection, stops), streamer)
        if streamer is not None:
            streamer.end()
        return torch.tensor([tokens], dtype=ids.dtype)

    def _choose(self, engine: Engine, tokens: list[int], limit: int, selector: Selector, streamer: Any) -> None:
        logits = engine.prefill(tokens)
        for made in range(1, limit + 1):
            token = selector.choose(logits, np.asarray(tokens, np.int32))
            tokens.append(token)
            if streamer is not None:
                streamer.put(torch.tensor([token]))
            if token in selector.stop_tokens or made == limit:
                return
            logits = engine.decode(token)


def attach_engine(model: nn.Module) -> None:
    """Let the engine answer this model's `generate` where it can. Models that do not generate are left alone."""
    if hasattr(type(model), "_prepare_generation_config"):
        model.generate = EngineGenerate(model)  # type: ignore[assignment]


def model_weights(model: nn.Module) -> tuple[DecoderSpec, EngineWeights]:
    """What a transformers model is and where its weights lie. Raises a LowbitError that says why the engine cannot have it."""
    spec = spec_from_config(cast(Any, model).config.to_dict())
    held = _held_weights(model)
    dense = dict(model.named_parameters(remove_duplicate=False))
    if any(p.device.type != "cpu" for p in dense.values()):
        raise LowbitError("the model is not on the CPU")
    weights = EngineWeights()
    for (role, layer), located in spec.locate({*held, *dense}).items():
        bias = None if located.bias is None else _vector(dense[located.bias])
        if role in MATRIX_ROLES:
            weights.matrices[role, layer] = _matrix(located, held, dense).with_bias(bias)
        else:
            weights.vectors[role, layer] = (_vector(dense[located.names[0][0]]), bias)
    return spec, weights


def _held_weights(model: nn.Module) -> dict[str, PackedWeight]:
    """The packed weights under the names that dense ones would have."""
    held: dict[str, PackedWeight] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, LowBitLinear | LowBitEmbedding):
            held[f"{path}.weight"] = module.packed_weight
        elif isinstance(module, LowBitExperts):
            held |= {
                f"{path}.{name}": cast(PackedWeight, getattr(module, name)) for name in (module.up_name, "down_proj")
            }
    return held


def _matrix(located: Located, held: dict[str, PackedWeight], dense: dict[str, nn.Parameter]) -> Matrix:
    name = located.names[0][0]
    if name in held:
        return _packed_matrix(name, held[name])
    weight = dense[name].detach()
    if located.weight.transposed:
        weight = weight.transpose(-1, -2)
    if weight.dtype not in DTYPE_NAMES:
        raise LowbitError(f"{name} is {weight.dtype}, which the engine does not read")
    weight = weight.contiguous()
    if weight.dtype == torch.bfloat16:
        return plain(weight.view(torch.uint16).numpy(), "bfloat16")
    return plain(weight.numpy())


def _packed_matrix(name: str, weight: PackedWeight) -> Matrix:
    buffer = weight.tensors.get(PREPARED)
    if buffer is None:
        kernel = weight.kernel.name if weight.kernel else "none yet"
        raise LowbitError(
            f"{name} ({weight.format}) is run by the kernel {kernel}, and the engine reads what the core prepares"
        )
    count = weight.shape[0] if len(weight.shape) == 3 else 1
    rows, cols = weight.shape[-2:]
    return Matrix(buffer.data_ptr(), rows, cols, PREPARED_KIND, "float32", count, buffer.numel() // count, None, buffer)


def _vector(parameter: torch.Tensor) -> Floats:
    return np.ascontiguousarray(parameter.detach().float().numpy().ravel())


def _input_refusal(ids: Any, extra: dict[str, Any]) -> str | None:
    if not isinstance(ids, torch.Tensor) or ids.dim() != 2 or ids.is_floating_point():
        return "the input is not one tensor of token ids"
    if ids.shape[0] != 1:
        return f"{ids.shape[0]} prompts at once; the engine's generate takes one"
    if ids.shape[1] == 0:
        return "the prompt is empty"
    if ids.device.type != "cpu":
        return f"the input is on {ids.device.type}"
    mask = extra.get("attention_mask")
    if mask is not None and not bool((mask == 1).all()):
        return "the attention mask hides tokens"
    asked = [
        name
        for name in ("logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn", "custom_generate")
        if extra.get(name)
    ]
    asked += [
        name
        for name in ("assistant_model", "synced_gpus", "negative_prompt_ids", "tokenizer")
        if extra.get(name) is not None
    ]
    return f"{asked[0]} was given" if asked else None


def _config_refusal(config: Any, rest: dict[str, Any]) -> str | None:
    unknown = [name for name in rest if name not in _FORWARDED]
    if unknown:
        return f"{unknown[0]} was given"
    for name, value in config.to_dict().items():
        required = _REQUIRED if name in _REQUIRED else _IDLE
        if name in required:
            if value is not None and value != required[name]:
                return f"{name}={value!r}"
        elif name not in _HONOURED and value not in (None, False, [], {}, ""):
            return f"{name}={value!r}"
    return None


def _new_tokens(config: Any, prompt: int) -> int:
    if config.max_new_tokens is not None:
        return int(config.max_new_tokens)
    # transformers' default of 20 counts new tokens; a maximum that somebody set counts all.
    default = 20
    return default if config.max_length in (None, default) else max(int(config.max_length) - prompt, 0)


def _selection(config: Any, prompt: int) -> Selection:
    settings = {k: v for k, v in config.to_dict().items() if v is not None}
    least = max(int(settings.get("min_new_tokens", 0)), int(settings.get("min_length", 0)) - prompt)
    forbidden = tuple(tuple(words) for words in settings.get("bad_words_ids", ()))
    chosen = Selection.from_generation_config(settings).replace(min_new_tokens=max(least, 0), forbidden=forbidden)
    if not config.do_sample:
        return chosen
    return chosen.replace(seed=int(torch.randint(1 << 62, (1,))))


def _as_tuple(ids: Any) -> tuple[int, ...]:
    if ids is None:
        return ()
    return tuple(ids) if isinstance(ids, list | tuple) else (int(ids),)
