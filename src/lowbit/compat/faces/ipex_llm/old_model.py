"""What the old library put on every model that it made: `save_low_bit`, `generate` with guesses, and the names of its figures.

model.generate(ids, lookahead=3)                    looks back in the text for what may follow
model.generate(ids, max_step_draft=8, ...)          with `speculative=True`: an int4 copy of the model guesses
model.lookup_generate(...), model.speculative_generate(...)
model.first_token_time, n_token_generated, n_drafted, n_matched, e2e_time_without_first     of the last such call
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowbit.bridge import EngineGenerate
from lowbit.bridge.clock import Clock
from lowbit.bridge.guessing import Draft
from lowbit.checkpoint.save import save_low_bit as _save_low_bit
from lowbit.compat.faces.ipex_llm.transformers.pipeline_parallel import pipeline_parallel_generate
from lowbit.compat.ignored import say_ignored, say_once
from lowbit.errors import LowbitError
from lowbit.formats import CASTS
from lowbit.runtime.speculate import Caution

LOW_BIT_KEY = "bigdl_transformers_low_bit"
_PERFORMANCE_MODE = "IPEX_LLM_PERFORMANCE_MODE"
# What that mode does: two tokens looked up for prompts from this length on.
_LONG_PROMPT, _LOOKED_UP = 100, 2
_LONGEST_MATCH = 2
SPECULATIVE = (
    "max_step_draft", "th_stop_draft", "auto_th_stop_draft", "auto_parameters", "min_step_draft", "hf_adjust", "th_batch_num",
)  # fmt: skip
_SAVING_IDLE = ("safe_serialization", "save_function", "is_main_process", "push_to_hub", "state_dict", "variant")
FIGURES = ("first_token_time", "n_token_generated", "n_drafted", "n_matched", "e2e_time_without_first")


def say_ignored_in(owner: str, keywords: dict[str, Any], reasons: dict[str, str]) -> None:
    """Take keywords without meaning out of a call's, and say so where they ask for something."""
    for name, reason in reasons.items():
        if keywords.pop(name, None):
            say_ignored(owner, name, reason)


def adopt(model: Any, low_bit: str | None, draft: Any = None) -> Any:
    """Give a model of ours the methods and attributes of the old library's; `low_bit` is the old name of its format."""
    if low_bit is not None and hasattr(model, "config"):
        setattr(model.config, LOW_BIT_KEY, str(low_bit))
    model.save_low_bit = partial(save_low_bit, model)
    if not hasattr(type(model), "_prepare_generation_config"):
        return model
    now = getattr(model, "generate", None)
    cache = {"cache": now.cache} if isinstance(now, EngineGenerate) else {}
    model.generate = OldGenerate(model, draft=draft, **cache)
    if draft is not None:
        # Beside the module's own registry: a draft is no part of the model that is saved, moved or trained.
        object.__setattr__(model, "draft_model", draft)
        clear_benchmarks(model)
    return offer_methods(model)


def offer_methods(model: Any) -> Any:
    """The ways to generate that every model of the old library had, one in full precision too."""
    for method in (lookup_generate, speculative_generate, pipeline_parallel_generate, clear_benchmarks):
        setattr(model, method.__name__, partial(method, model))
    return model


def save_low_bit(model: nn.Module, save_dir: str | Path, **kwargs: Any) -> Path:
    """Save a low-bit model as a folder of safetensors that transformers reads; a cast one as transformers saves it."""
    say_ignored_in(
        "save_low_bit", kwargs, dict.fromkeys(_SAVING_IDLE, "the form of the folder is lowbit's, in safetensors")
    )
    name = getattr(getattr(model, "config", None), LOW_BIT_KEY, None)
    if name in CASTS and not getattr(model, "lowbit_report", None):
        model.save_pretrained(save_dir, **kwargs)  # type: ignore[operator]
        return Path(save_dir)
    return _save_low_bit(model, save_dir, **kwargs)


class OldGenerate(EngineGenerate):
    """`generate` with the old library's keywords for guesses."""

    def __init__(self, model: nn.Module, draft: Any = None, **options: Any) -> None:
        super().__init__(model, **options)
        self.draft = draft

    def __call__(self, inputs: Any = None, generation_config: Any = None, **kwargs: Any) -> Any:
        asked = {name: kwargs.pop(name) for name in SPECULATIVE if name in kwargs}
        lookahead, longest = kwargs.pop("lookahead", None), kwargs.get("max_matching_ngram_size")
        if lookahead is None and os.environ.get(_PERFORMANCE_MODE) == "1" and _width(inputs, kwargs) >= _LONG_PROMPT:
            lookahead = _LOOKED_UP
        if lookahead:
            refusal = _lookup_refusal(inputs, kwargs)
            if refusal is None:
                kwargs |= {
                    "prompt_lookup_num_tokens": int(lookahead),
                    "max_matching_ngram_size": longest or _LONGEST_MATCH,
                }
                return self._guessed(inputs, generation_config, kwargs)
            say_once(f"generate: lookahead has no effect: {refusal}")
            kwargs.pop("max_matching_ngram_size", None)
        elif self.draft is not None and "assistant_model" not in kwargs:
            kwargs["draft"] = draft_of(self.draft, asked)
            return self._guessed(inputs, generation_config, kwargs)
        return super().__call__(inputs, generation_config, **kwargs)

    def _guessed(self, inputs: Any, generation_config: Any, kwargs: dict[str, Any]) -> Any:
        """A call with guesses, and its figures on the model."""
        clock = kwargs.pop("clock", None) or Clock()
        out = super().__call__(inputs, generation_config, clock=clock, **kwargs)
        seconds, guesser = clock.seconds, self.guesser
        new_tokens = out.shape[1] - _width(inputs, kwargs) if isinstance(out, torch.Tensor) else len(seconds)
        first, last = (seconds[0], seconds[-1]) if seconds else (0.0, 0.0)
        drafted, matched = (guesser.drafted, guesser.matched) if guesser is not None else (0, 0)
        for name, value in zip(FIGURES, (first, new_tokens, drafted, matched, last - first), strict=True):
            object.__setattr__(self.model, name, value)
        return out


def draft_of(model: Any, asked: dict[str, Any]) -> Draft:
    """How an int4 copy guesses, from the old keywords."""
    if asked.get("hf_adjust"):
        say_ignored(
            "generate", "hf_adjust", "the number of guesses is bounded by max_step_draft, and ends early when unsure"
        )
    if asked.get("th_batch_num"):
        say_ignored("generate", "th_batch_num", "guesses are checked in one step, however many they are")
    every, memory, wanted, step, inertia = asked.get("auto_parameters") or (1, 0.5, 0.9, 1e-2, 0.9)
    caution = Caution(
        least=float(asked.get("th_stop_draft", 0.8)),
        guesses=int(asked.get("min_step_draft", 3)),
        adapts=bool(asked.get("auto_th_stop_draft", True)),
        every=int(every),
        memory=float(memory),
        wanted=float(wanted),
        step=float(step),
        inertia=float(inertia),
    )
    return Draft(model, int(asked.get("max_step_draft", 8)), caution)


def lookup_generate(
    model: Any,
    inputs: torch.Tensor | None = None,
    max_new_tokens: int = 10,
    num_output_tokens: int = 10,
    max_matching_ngram_size: int | None = None,
    generation_config: Any = None,
    streamer: Any = None,
    attention_mask: torch.Tensor | None = None,
    **sampling_kwargs: Any,
) -> Any:
    """Generate with guesses looked up in the text so far: `num_output_tokens` at a time."""
    named = {"streamer": streamer, "attention_mask": attention_mask, "max_matching_ngram_size": max_matching_ngram_size}
    sampling_kwargs |= {name: value for name, value in named.items() if value is not None}
    refusal = _lookup_refusal(inputs, sampling_kwargs)
    if refusal is not None:
        raise LowbitError(f"lookup_generate cannot run this call: {refusal}; use generate")
    # A model in full precision has transformers' own generate, which calls it otherwise.
    word = "lookahead" if isinstance(model.generate, OldGenerate) else "prompt_lookup_num_tokens"
    sampling_kwargs |= {word: num_output_tokens, "max_new_tokens": max_new_tokens}
    return model.generate(inputs, generation_config, **sampling_kwargs)


def speculative_generate(
    model: Any,
    inputs: torch.Tensor | None = None,
    draft_model: Any = None,
    max_new_tokens: int = 10,
    generation_config: Any = None,
    streamer: Any = None,
    attention_mask: torch.Tensor | None = None,
    **kwargs: Any,
) -> Any:
    """Generate with the guesses of an int4 copy of the model, or of another model."""
    named = {"streamer": streamer, "attention_mask": attention_mask, "max_new_tokens": max_new_tokens}
    kwargs |= {name: value for name, value in named.items() if value is not None}
    generate = model.generate
    if not isinstance(generate, OldGenerate) or (draft_model is None and generate.draft is None):
        raise LowbitError(
            "speculative_generate needs a model that guesses: load this one with from_pretrained(load_in_low_bit='bf16', "
            "speculative=True), or pass draft_model=; lookup_generate guesses without one"
        )
    if draft_model is None or draft_model is generate.draft:
        return generate(inputs, generation_config, **kwargs)
    asked = {name: kwargs.pop(name) for name in SPECULATIVE if name in kwargs}
    return generate._guessed(inputs, generation_config, kwargs | {"draft": draft_of(draft_model, asked)})


def clear_benchmarks(model: Any) -> None:
    """Set the figures of the last call back to nothing."""
    for name in FIGURES:
        object.__setattr__(model, name, 0)


def _width(inputs: Any, kwargs: dict[str, Any]) -> int:
    ids = inputs if inputs is not None else kwargs.get("input_ids")
    return int(ids.shape[1]) if isinstance(ids, torch.Tensor) and ids.dim() > 1 else 0


def _lookup_refusal(inputs: Any, kwargs: dict[str, Any]) -> str | None:
    """Why what follows cannot be looked up in the text so far, or None."""
    ids = inputs if inputs is not None else kwargs.get("input_ids")
    if not isinstance(ids, torch.Tensor):
        return "there are no token ids to look in"
    if len(ids) > 1:
        return "the text so far is looked through for one prompt at a time"
    return "it goes with one answer, not with beams" if (kwargs.get("num_beams") or 1) > 1 else None
