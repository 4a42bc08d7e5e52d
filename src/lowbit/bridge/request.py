"""One call of transformers' generate, read for the engine: its prompts without their padding, and what is asked of them.

    .._refusal(...)    why transformers' own loop must run a call (a keyword the engine does not know, a mask with holes), or None
    read(...)          the call as a `Request`
    fill_rows(...)     rows of different lengths as one tensor, filled up as transformers does

Prompts of a batch are padded on the left, and the attention mask says how far; the engine has a slot for each and needs no padding.
Penalties count the padding all the same, because transformers' do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lowbit.errors import LowbitError
from lowbit.models.spec import DecoderSpec
from lowbit.runtime.selection import Selection
from lowbit.runtime.settings import BeamSettings, Settings
from lowbit.runtime.slots import Tokens

# What transformers merges into a GenerationConfig and the engine honours, or may ignore since it changes no token.
_HONOURED = {
    "do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty", "min_length", "min_new_tokens",
    "max_length", "max_new_tokens", "eos_token_id", "bos_token_id", "pad_token_id", "bad_words_ids", "use_cache",
    "transformers_version", "_from_model_config", "disable_compile", "num_beams", "num_return_sequences", "length_penalty",
    "early_stopping", "num_beam_groups", "diversity_penalty", "prompt_lookup_num_tokens", "max_matching_ngram_size",
}  # fmt: skip
# What must have this value, or be unset.
_REQUIRED = {
    "return_dict_in_generate": False, "output_scores": False, "output_logits": False, "output_attentions": False,
    "output_hidden_states": False, "renormalize_logits": False, "remove_invalid_values": False, "cache_implementation": None,
}  # fmt: skip
# Settings that say how a feature works which is off without another setting.
_IDLE = {
    "token_healing": False, "encoder_repetition_penalty": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0,
    "no_repeat_ngram_size": 0, "encoder_no_repeat_ngram_size": 0, "low_memory": False, "is_assistant": False,
    "num_assistant_tokens": 20, "num_assistant_tokens_schedule": "constant", "assistant_confidence_threshold": 0.4,
    "assistant_lookbehind": 10, "target_lookbehind": 10, "guidance_scale": None, "top_h": None,
}  # fmt: skip
_FORWARDED = {"attention_mask", "use_cache", "logits_to_keep", "cache_position", "position_ids"}
_OWN_LOOPS = ("logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn", "custom_generate")
_OTHER_INPUTS = ("synced_gpus", "negative_prompt_ids", "tokenizer")


@dataclass(frozen=True)
class Request:
    """Prompts and settings. `seen` are the prompts as they came, [prompts, width]; `fill` pads answers that end early."""

    prompts: tuple[Tokens, ...]
    seen: Tokens
    settings: Settings
    returns: int
    fill: int
    seeds: tuple[int | None, ...]

    @property
    def beams(self) -> int:
        return self.settings.beams.num_beams

    @property
    def slots(self) -> int:
        """Sequences that are under way at once."""
        return self.beams if self.beams > 1 else len(self.prompts) * self.returns

    @property
    def length(self) -> int:
        return int(self.seen.shape[1]) + self.settings.max_new_tokens


def refuse_what_is_no_prompt(ids: Any, others: Any) -> None:
    """Refuse what no loop can take: a text, tokens that are no tensor or no rows of one, none where no other input is."""
    if isinstance(ids, str | bytes):
        raise LowbitError(
            "generate takes token ids, not a text: model.generate(**tokenizer(text, return_tensors='pt')), and tokenizer.decode "
            "makes a text of the answer"
        )
    if isinstance(ids, list | tuple):
        raise LowbitError(
            f"generate takes token ids as a tensor [prompts, tokens], not a {type(ids).__name__}: the tokenizer makes one with "
            "return_tensors='pt'"
        )
    if not isinstance(ids, torch.Tensor) or ids.is_floating_point():
        return
    if ids.dim() == 1:
        raise LowbitError(f"generate takes token ids [prompts, tokens], not {list(ids.shape)}: one prompt is ids[None]")
    beside = (given for name, given in others.items() if name not in ("input_ids", "attention_mask"))
    if 0 in ids.shape and not any(isinstance(given, torch.Tensor) for given in beside):
        raise LowbitError("the prompt is empty: give the model at least one token to answer")


def input_refusal(ids: Any, extra: dict[str, Any]) -> str | None:
    """Why the engine cannot take these inputs, or None."""
    if not isinstance(ids, torch.Tensor) or ids.dim() != 2 or ids.is_floating_point():
        return "the input is not one tensor of token ids"
    if 0 in ids.shape:
        return "the prompt is empty"
    if ids.device.type != "cpu":
        return f"the input is on {ids.device.type}"
    asked = [name for name in _OWN_LOOPS if extra.get(name)]
    asked += [name for name in _OTHER_INPUTS if extra.get(name) is not None]
    return f"{asked[0]} was given" if asked else None


def config_refusal(config: Any, rest: dict[str, Any]) -> str | None:
    """Why the engine cannot do what this GenerationConfig and the keywords beside it ask, or None."""
    unknown = [name for name, value in rest.items() if name not in _FORWARDED and value is not None]
    if unknown:
        return f"{unknown[0]} was given"
    for name, value in config.to_dict().items():
        required = _REQUIRED if name in _REQUIRED else _IDLE
        if name in required:
            if value is not None and value != required[name]:
                return f"{name}={value!r}"
        elif name not in _HONOURED and value not in (None, False, [], {}, ""):
            return f"{name}={value!r}"
    beams, returns = config.num_beams or 1, config.num_return_sequences or 1
    if beams > 1 and config.do_sample:
        return f"num_beams={beams} with do_sample: the engine's beams draw nothing"
    if beams == 1 and returns > 1 and not config.do_sample:
        return f"num_return_sequences={returns} of a greedy call"
    return None


def batch_refusal(ids: torch.Tensor, mask: torch.Tensor, spec: DecoderSpec, streamer: Any, beams: int) -> str | None:
    """Why these prompts cannot go together through the engine, or None."""
    shown = mask.bool()
    if mask.shape != ids.shape or not bool(shown[:, -1].all()) or bool((shown[:, :-1] & ~shown[:, 1:]).any()):
        return "the attention mask hides tokens elsewhere than before a prompt"
    if streamer is not None and (len(ids) > 1 or beams > 1):
        return "a streamer follows one answer only"
    if len(ids) > 1 and any(layer.rope is not None and layer.rope.depends_on_length for layer in spec.layers):
        return "the rotary frequencies of a prompt depend on the longest of its batch"
    return None


def attention_mask(ids: torch.Tensor, config: Any, given: Any) -> torch.Tensor:
    """The mask of a call, or the one that transformers reads off the padding."""
    if isinstance(given, torch.Tensor):
        return given
    pad, stops = config.pad_token_id, as_tuple(config.eos_token_id)
    return torch.ones_like(ids) if pad is None or pad in stops else ids.ne(pad).long()


def read(ids: torch.Tensor, mask: torch.Tensor, config: Any, whole: int | None, check: bool) -> Request:
    """A call that was not refused; `whole` is the max_length that it named itself. Raises a LowbitError where its settings
    contradict themselves."""
    width = ids.shape[1]
    limit = _new_tokens(config, width, whole)
    if limit < 1:
        raise LowbitError(f"a prompt of {width} tokens leaves no room in max_length={config.max_length}")
    seen = ids.numpy().astype(np.int32)
    stops = as_tuple(config.eos_token_id)
    beams, returns = config.num_beams or 1, config.num_return_sequences or 1
    searched = BeamSettings()
    if beams > 1:
        given = {name: getattr(config, name, None) for name in BeamSettings.__dataclass_fields__}
        searched = BeamSettings(**{name: value for name, value in given.items() if value is not None})
    seeds = [int(torch.randint(1 << 62, (1,))) if config.do_sample else None for _ in range(len(ids) * returns)]
    fill = config.pad_token_id if config.pad_token_id is not None else stops[0] if stops else 0
    if beams > 1 and stops:
        fill = fill or stops[0]  # transformers' beams take token 0 for no padding token
    return Request(
        tuple(np.ascontiguousarray(row[shown]) for row, shown in zip(seen, mask.bool().numpy(), strict=True)),
        seen,
        Settings(limit, stop_tokens=stops, check=check, selection=_selection(config, width), beams=searched),
        returns,
        fill,
        tuple(seeds),
    )


def fill_rows(rows: Sequence[Sequence[int]], fill: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows as one tensor, the shorter ones filled up behind."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows], dtype=dtype)


def as_tuple(ids: Any) -> tuple[int, ...]:
    if ids is None:
        return ()
    return tuple(ids) if isinstance(ids, list | tuple) else (int(ids),)


def _new_tokens(config: Any, prompt: int, whole: int | None) -> int:
    if config.max_new_tokens is not None:
        return int(config.max_new_tokens)
    if whole is not None:
        return whole - prompt
    # transformers' default of 20 counts new tokens; a maximum that somebody set counts all.
    default = 20
    return default if config.max_length in (None, default) else int(config.max_length) - prompt


def _selection(config: Any, prompt: int) -> Selection:
    settings = {k: v for k, v in config.to_dict().items() if v is not None}
    least = max(int(settings.get("min_new_tokens", 0)), int(settings.get("min_length", 0)) - prompt)
    forbidden = tuple(tuple(words) for words in settings.get("bad_words_ids", ()))
    return Selection.from_generation_config(settings).replace(min_new_tokens=max(least, 0), forbidden=forbidden)
