"""Guesses through the face of bigdl.llm and ipex_llm: the text of the model alone, in fewer steps than it has tokens."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import lowbit.compat
from lowbit.compat.ignored import CompatWarning
from lowbit.errors import LowbitError
from lowbit.layers import packed_weights
from lowbit_assets import reference_model
from unit.checkpoint_cases import EVEN, make

pytestmark = pytest.mark.transformers
PROMPT = torch.tensor([[5, 9, 11, 4, 8, 5, 9, 11, 4, 8, 5, 9, 11]])
# What this asks for repeats itself.
REPETITIVE = "for i in range(3):\n    print(i)\n\nfor j in range(3):\n    print(j)\n\nfor k in range(3):\n"
TOKENS = 40


@pytest.fixture(autouse=True)
def old_names() -> Iterator[None]:
    with lowbit.compat.install(children=False):
        yield


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("llama", tmp_path_factory.mktemp("face") / "dense", **EVEN)


def load(dense: Path, **keywords: Any) -> Any:
    from ipex_llm.transformers import AutoModelForCausalLM  # type: ignore[import-not-found]

    return AutoModelForCausalLM.from_pretrained(dense, **keywords)


def test_lookup_generate_is_the_same_text(dense: Path) -> None:
    model = load(dense, load_in_low_bit="sym_int8")
    plain = model.generate(PROMPT, max_new_tokens=16, do_sample=False)
    assert torch.equal(model.generate(PROMPT, max_new_tokens=16, do_sample=False, lookahead=3), plain)
    assert model.generate.why_not is None and model.n_token_generated == 16 and model.n_drafted > 0
    found = model.lookup_generate(PROMPT, max_new_tokens=16, num_output_tokens=3, do_sample=False)
    assert torch.equal(found, plain) and model.first_token_time > 0
    with pytest.raises(LowbitError, match="one prompt at a time"):
        model.lookup_generate(PROMPT.expand(2, -1), max_new_tokens=4)
    with pytest.warns(CompatWarning, match="one prompt at a time"):
        assert (
            model.generate(PROMPT.expand(2, -1), max_new_tokens=4, lookahead=2, max_matching_ngram_size=2).shape[0] == 2
        )


def test_performance_mode_looks_long_prompts_up(dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(dense, load_in_low_bit="sym_int8")
    monkeypatch.setenv("IPEX_LLM_PERFORMANCE_MODE", "1")
    model.generate(PROMPT.repeat(1, 8), max_new_tokens=8, do_sample=False)
    assert model.n_drafted > 0


def test_speculative_generate_is_the_same_text(dense: Path) -> None:
    model = load(dense, load_in_low_bit="bf16", speculative=True)
    assert packed_weights(model.draft_model) and not hasattr(model, "lowbit_report")
    assert not [name for name, _ in model.named_modules() if "draft_model" in name]
    alone = load(dense, load_in_low_bit="bf16")
    plain = alone.generate(PROMPT, max_new_tokens=16, do_sample=False)
    out = model.generate(
        PROMPT, max_new_tokens=16, do_sample=False, max_step_draft=4, th_stop_draft=0.6, min_step_draft=2
    )
    assert torch.equal(out, plain) and model.generate.why_not is None
    assert model.n_drafted >= model.n_matched >= 0 and model.n_drafted > 0
    assert model.e2e_time_without_first > 0
    again = model.speculative_generate(
        PROMPT, max_new_tokens=16, do_sample=False, auto_parameters=[1, 0.5, 0.9, 0.01, 0.9]
    )
    assert torch.equal(again, plain)
    model.clear_benchmarks()
    assert model.n_drafted == 0
    # Without a draft, the keywords that steer one are left aside, as they were.
    assert torch.equal(alone.generate(PROMPT, max_new_tokens=16, do_sample=False, max_step_draft=4), plain)


@pytest.fixture(scope="module")
def prompt() -> torch.Tensor:
    tokenizer = transformers.AutoTokenizer.from_pretrained(reference_model("plain"))
    ids: torch.Tensor = tokenizer(REPETITIVE, return_tensors="pt").input_ids
    return ids


def check_guessed(model: Any, found: torch.Tensor, plain: torch.Tensor) -> None:
    """The same text, and guesses that were right: each of them is a token that cost no step."""
    assert torch.equal(found, plain) and model.generate.why_not is None
    assert model.n_token_generated == TOKENS and 0 < model.n_matched <= model.n_drafted
    assert model.generate.guesser.steps == TOKENS - model.n_matched


@pytest.mark.slow
def test_a_draft_saves_steps_of_a_real_model(prompt: torch.Tensor) -> None:
    model = load(reference_model("plain"), load_in_low_bit="bf16", speculative=True)
    asked = {"max_new_tokens": TOKENS, "do_sample": False, "eos_token_id": None}
    plain = load(reference_model("plain"), load_in_low_bit="bf16").generate(prompt, **asked)
    check_guessed(model, model.generate(prompt, **asked), plain)
    check_guessed(model, model.speculative_generate(prompt, **asked, max_step_draft=4, th_stop_draft=0.6), plain)
    assert model.n_matched > TOKENS // 2


@pytest.mark.slow
def test_looking_back_saves_steps_of_a_real_model(prompt: torch.Tensor) -> None:
    model = load(reference_model("plain"), load_in_4bit=True)
    asked = {"max_new_tokens": TOKENS, "do_sample": False, "eos_token_id": None}
    plain = model.generate(prompt, **asked)
    check_guessed(model, model.generate(prompt, **asked, lookahead=3), plain)
    check_guessed(model, model.lookup_generate(prompt, **asked, num_output_tokens=3), plain)
    assert model.n_matched > TOKENS // 4
