"""A few layers at a time say what the whole model says, in every family."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lowbit.recipe import recipe_named
from lowbit.runtime.files import open_files, read_spec, read_weights
from lowbit.runtime.loading import load_files
from lowbit.runtime.stages import staged_logits
from lowbit_assets import tiny_model
from lowbit_assets.tiny import FAMILIES

IDS = list(range(5, 45))
ALL = 1 << 30


@pytest.mark.parametrize("family", FAMILIES)
def test_stages_say_what_the_whole_says(family: str, tmp_path: Path) -> None:
    files = open_files(tiny_model(family, tmp_path / "plain"))
    spec = read_spec(files)
    expected = load_files(files, cache="fp32", compute="fp32").logits(IDS)
    for at_once in (1, ALL):  # each layer is a stage of its own; all of them are one
        found = staged_logits(read_weights(files, spec), spec, IDS, at_once)
        assert found.shape == (len(IDS), spec.vocab_size)
        assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("format", ["int4_g32", "int8_channel", "nf4"])
def test_low_bit_weights_too(format: str, tmp_path: Path) -> None:
    files = open_files(tiny_model("llama", tmp_path / "plain"))
    spec, recipe = read_spec(files), recipe_named(format)
    expected = load_files(files, recipe, cache="fp32", compute="fp32").logits(IDS)
    found = staged_logits(read_weights(files, spec, recipe), spec, IDS, 1)
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()
