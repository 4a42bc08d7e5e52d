"""Batches, beams and several answers of `model.generate` through the engine, against transformers' own loop, token for token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import lowbit
from cpu.test_bridge import IDS, own_generate, packed_model
from lowbit.errors import CheckpointError, KernelError, LowbitError
from lowbit_assets import FAMILIES, tiny_model_in_memory

pytestmark = pytest.mark.transformers
PAD = 0
# Three prompts of different lengths, padded on the left.
BATCH = torch.tensor(
    [[PAD] * 5 + [9, 30, 31, 32, 7, 8], [*range(40, 51)], [PAD] * 9 + [77, 5]],
)
MASK = BATCH.ne(PAD).long()


def both(model: Any, *arguments: Any, **keywords: Any) -> tuple[torch.Tensor, torch.Tensor]:
    found = model.generate(*arguments, **keywords)
    assert model.generate.why_not is None
    return found, own_generate(model, *arguments, **keywords)


@pytest.mark.parametrize("family", FAMILIES)
def test_padded_batches_equal_transformers(family: str) -> None:
    model = packed_model(family)
    found, expected = both(
        model, BATCH, attention_mask=MASK, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=PAD
    )
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    "keywords",
    [
        {"attention_mask": MASK},
        {},  # the mask is read off the padding
        {"attention_mask": MASK, "repetition_penalty": 1.4},
        {"attention_mask": MASK, "min_length": 16},
        {"attention_mask": MASK, "bad_words_ids": [[5], [7, 9]]},
        {"attention_mask": MASK, "max_length": 20, "max_new_tokens": None},
    ],
    ids=lambda k: ", ".join(k) or "no mask",
)
def test_batches_whose_answers_end_at_different_places(keywords: dict[str, Any]) -> None:
    model = packed_model()
    plain = own_generate(model, BATCH, attention_mask=MASK, max_new_tokens=12, do_sample=False, pad_token_id=PAD)
    stops = [int(plain[0, 14]), int(plain[2, 17])]
    limit = {"max_new_tokens": 14} | keywords
    found, expected = both(model, BATCH, do_sample=False, pad_token_id=PAD, eos_token_id=stops, **limit)
    assert torch.equal(found, expected)
    assert (found[:, 11:] == PAD).any()  # somebody ended early


BEAMS = [
    {"num_beams": 4},
    {"num_beams": 4, "num_return_sequences": 4},
    {"num_beams": 3, "length_penalty": 0.3, "early_stopping": True},
    {"num_beams": 2, "length_penalty": 2.0, "early_stopping": "never", "num_return_sequences": 2},
    {"num_beams": 2, "length_penalty": -1.0, "repetition_penalty": 1.3, "min_new_tokens": 5},
]


@pytest.mark.parametrize("ends", [False, True], ids=["open", "ending"])
@pytest.mark.parametrize("keywords", BEAMS, ids=str)
def test_beams_of_a_batch_equal_transformers(keywords: dict[str, Any], ends: bool) -> None:
    model = packed_model()
    plain = own_generate(
        model, BATCH, attention_mask=MASK, max_new_tokens=10, do_sample=False, num_beams=3, pad_token_id=PAD
    )
    stops = [int(plain[0, 13]), int(plain[1, 15])] if ends else None
    found, expected = both(
        model,
        BATCH,
        attention_mask=MASK,
        max_new_tokens=10,
        do_sample=False,
        pad_token_id=PAD,
        eos_token_id=stops,
        **keywords,
    )
    assert torch.equal(found, expected)


@pytest.mark.parametrize("family", ["gemma2", "gpt2", "mixtral"])
def test_beams_of_other_families(family: str) -> None:
    found, expected = both(
        packed_model(family), IDS, max_new_tokens=12, do_sample=False, num_beams=4, num_return_sequences=2
    )
    assert torch.equal(found, expected)


def test_groups_of_beams_run_on_the_engine() -> None:
    model = packed_model()
    settings = {
        "max_new_tokens": 6,
        "num_beams": 4,
        "num_beam_groups": 2,
        "num_return_sequences": 4,
        "do_sample": False,
    }
    apart = model.generate(IDS, diversity_penalty=50.0, eos_token_id=None, **settings)
    assert model.generate.why_not is None and apart.shape == (4, 17)
    two = own_generate(
        model, IDS, max_new_tokens=6, num_beams=2, num_return_sequences=2, do_sample=False, eos_token_id=None
    )
    rows = {tuple(row) for row in apart.tolist()}
    assert {tuple(row) for row in two.tolist()} < rows and len({row[11] for row in rows}) > 1
    with pytest.raises(ValueError):  # transformers' own, of any wording
        model.generate(IDS, max_new_tokens=4, num_beams=3, num_beam_groups=2, do_sample=False, diversity_penalty=1.0)
    assert "do not divide into 2 groups" in model.generate.why_not


def test_several_draws_of_each_prompt() -> None:
    model = packed_model()
    torch.manual_seed(3)
    settings = {
        "attention_mask": MASK,
        "do_sample": True,
        "num_return_sequences": 3,
        "max_new_tokens": 8,
        "temperature": 2.0,
    }
    first = model.generate(BATCH, pad_token_id=PAD, **settings)
    torch.manual_seed(3)
    again = model.generate(BATCH, pad_token_id=PAD, **settings)
    assert model.generate.why_not is None and torch.equal(first, again)
    assert torch.equal(first[:, :11], BATCH.repeat_interleave(3, 0))
    assert len({tuple(row) for row in first.tolist()}) > 6
    likeliest = model.generate(BATCH, **(settings | {"top_k": 1}), pad_token_id=PAD)
    greedy = model.generate(BATCH, attention_mask=MASK, do_sample=False, max_new_tokens=8, pad_token_id=PAD)
    assert torch.equal(likeliest, greedy.repeat_interleave(3, 0))


@pytest.mark.parametrize(
    ("arguments", "keywords", "error"),
    [
        ((IDS,), {"num_return_sequences": 2, "do_sample": False, "max_new_tokens": 2}, "num_return_sequences"),
        ((IDS,), {"max_length": 5}, "max_length"),
    ],
    ids=["returns", "length"],
)
def test_what_is_wrong_is_said_by_transformers(arguments: Any, keywords: dict[str, Any], error: str) -> None:
    model = packed_model()
    with pytest.raises((ValueError, RuntimeError, IndexError), match=error):
        model.generate(*arguments, **keywords)


def test_what_is_no_prompt_is_said() -> None:
    model = packed_model()
    with pytest.raises(LowbitError, match="the prompt is empty"):
        model.generate(IDS[:, :0], max_new_tokens=2)
    with pytest.raises(LowbitError, match=r"not \[11\]: one prompt is ids\[None\]"):
        model.generate(IDS[0], max_new_tokens=2)
    states = model.get_input_embeddings()(IDS)
    out = model.generate(IDS[:, :0], inputs_embeds=states, max_new_tokens=2, do_sample=False)
    assert torch.equal(out, own_generate(model, IDS, max_new_tokens=2, do_sample=False)[:, IDS.shape[1] :])


def test_prompts_are_kept_in_a_file(tmp_path: Path) -> None:
    model, file = packed_model(), tmp_path / "prompt.cache"
    plain = model.generate(IDS, max_new_tokens=8, do_sample=False)
    for _ in range(2):
        kept = model.generate(IDS, max_new_tokens=8, do_sample=False, prompt_cache=file)
        assert torch.equal(kept, plain) and file.is_file()
    longer = torch.cat([IDS, torch.tensor([[3, 4]])], 1)
    found = model.generate(longer, max_new_tokens=8, do_sample=False, prompt_cache=file, num_beams=2)
    assert torch.equal(found, model.generate(longer, max_new_tokens=8, do_sample=False, num_beams=2))
    with pytest.raises(CheckpointError, match="made with another model"):
        packed_model("gpt2").generate(IDS, max_new_tokens=2, prompt_cache=file)
    with pytest.raises(LowbitError, match=r"prompt_cache needs the engine, which cannot run this call: max_time"):
        model.generate(IDS, max_new_tokens=2, prompt_cache=file, max_time=9.0)


def test_numbers_that_are_none_end_in_a_sentence() -> None:
    model: Any = tiny_model_in_memory("llama").eval()
    lowbit.optimize_model(model, low_bit="int8_g32")
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight.fill_(float("nan"))
    with pytest.raises(KernelError, match="the logits are not numbers"):
        model.generate(IDS, max_new_tokens=2)
    with pytest.raises(KernelError, match="appears in layer 1, in the query, key and value projections"):
        model.generate(IDS, max_new_tokens=2, check=True)


def test_a_prompt_beyond_the_sliding_window_is_refused_where_asked() -> None:
    model = packed_model("gemma2")
    window = model.config.sliding_window
    whole, long = torch.full((1, window), 7), torch.full((2, window + 3), 7)
    mask = torch.ones_like(long)
    mask[:, :2] = 0
    assert model.generate(whole, max_new_tokens=2, within_window=True).shape[1] > window
    assert model.generate(long, attention_mask=mask, max_new_tokens=2).shape[1] > window + 3
    with pytest.raises(LowbitError, match=f"{window + 1} tokens and the model's sliding window shows {window}"):
        model.generate(long, attention_mask=mask, max_new_tokens=2, within_window=True)
    with pytest.raises(LowbitError, match="within_window needs the engine, which cannot run this call: max_time"):
        model.generate(whole, max_new_tokens=2, within_window=True, max_time=9.0)
