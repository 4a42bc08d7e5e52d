"""The past has two names in transformers, by release; what calls a model finds the one that it takes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from lowbit.models.past import PAST_NAMES, name_of_past, past_of, transformers_name
from lowbit_assets import tiny_model_in_memory

pytestmark = pytest.mark.transformers


def old(input_ids: Any, past_key_values: Any = None) -> Any:
    return past_key_values


def new(input_ids: Any, cache: Any = None) -> Any:
    return cache


def neither(*args: Any, **kwargs: Any) -> Any:
    return args, kwargs


def test_a_call_is_given_the_past_under_the_name_that_it_takes() -> None:
    assert (name_of_past(old), name_of_past(new)) == ("past_key_values", "cache")
    assert name_of_past(neither) == transformers_name() in PAST_NAMES


@pytest.mark.parametrize("name", PAST_NAMES)
def test_an_output_is_asked_under_both_names(name: str) -> None:
    assert past_of(SimpleNamespace(**{name: 3})) == 3
    assert past_of(SimpleNamespace(logits=1)) is None


@torch.no_grad()
def test_a_model_goes_on_from_what_it_gave() -> None:
    model = tiny_model_in_memory("llama").eval()
    tokens = torch.tensor([[1, 5, 9, 4, 7]])
    first = model(tokens[:, :3], use_cache=True)
    held = past_of(first)
    assert isinstance(held, transformers.Cache)
    rest = model(tokens[:, 3:], **{name_of_past(model.forward): held})
    torch.testing.assert_close(rest.logits, model(tokens).logits[:, 3:], rtol=1e-4, atol=1e-5)
