"""OpenVINO's own pipeline answers from our folders as our engine does, with both of its attentions.

Its paged attention takes windows, slopes and sinks out of the graph by the shape that they have there; where it does not find
them it computes without, and says nothing. So every family that has one stands here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import openvino_genai
import pytest

from lowbit.openvino import verify, write_decoder
from lowbit.openvino.library import ov
from lowbit.openvino.opening import EXACT
from lowbit.runtime import load
from lowbit_assets import smollm2_gguf, tiny_model
from lowbit_assets.tiny import write_byte_tokenizer
from unit import family_cases
from unit.family_cases import CASES, prompt

COUNT = 12
FAMILIES = (
    "llama",
    "mistral",
    "mixtral",
    "qwen2, windows",
    "qwen2_moe",
    "gemma3",
    "phi3",
    "phi",
    "cohere",
    "gpt2",
    "opt",
    "bloom",
    "mpt",
    "falcon, alibi",
    "gpt_oss",
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The pipeline wants one; it is given numbers."""
    folder = tmp_path_factory.mktemp("tokenizer")
    write_byte_tokenizer(tiny_model("llama", folder / "plain"))
    write_decoder(folder / "plain", folder / "out")
    return openvino_genai.Tokenizer(folder / "out")


def answer(folder: Path, tokenizer: Any, **settings: Any) -> list[int]:
    pipeline = openvino_genai.LLMPipeline(folder, tokenizer, "CPU", **settings, **EXACT)
    config = openvino_genai.GenerationConfig(max_new_tokens=COUNT, do_sample=False, ignore_eos=True, eos_token_id=2)
    ids = np.array([prompt()], np.int64)
    return list(
        pipeline.generate(openvino_genai.TokenizedInputs(ov.Tensor(ids), ov.Tensor(np.ones_like(ids))), config).tokens[
            0
        ]
    )


def written(family: str, folder: Path) -> list[int]:
    """A model of a family and its folder; what our engine answers."""
    model_type, fields = CASES[family]
    model = family_cases.tiny_model(model_type, fields, "sdpa" if fields.get("alibi") else "eager")
    model.save_pretrained(folder / "plain")
    write_decoder(folder / "plain", folder / "out", tokenizer=False)
    ours = load(folder / "plain", cache="fp32", compute="fp32")
    return list(ours.generate(prompt(), max_new_tokens=COUNT, do_sample=False, stop_tokens=()).tokens)


@pytest.mark.parametrize("family", FAMILIES)
def test_both_attentions_answer_as_the_engine(family: str, tokenizer: Any, tmp_path: Path) -> None:
    expected = written(family, tmp_path)
    for attention in ("SDPA", "PA"):
        assert answer(tmp_path / "out", tokenizer, ATTENTION_BACKEND=attention) == expected, attention


def test_scores_that_are_squeezed_run_without_paged_attention(tokenizer: Any, tmp_path: Path) -> None:
    """Gemma 2: no operation for it, so the pipeline that was not told which attention takes the other one."""
    expected = written("gemma2", tmp_path)
    assert answer(tmp_path / "out", tokenizer) == expected


@pytest.mark.slow
def test_a_real_model_answers_from_the_blocks_of_its_gguf_file(tmp_path: Path) -> None:
    """Its tokenizer too: the graph cuts the sample texts as tokenizer.json does, or a note would say so."""
    made = write_decoder(smollm2_gguf(), tmp_path / "out")
    assert not made.notes and verify(made).passed
    pipeline = openvino_genai.LLMPipeline(tmp_path / "out", "CPU")
    config = openvino_genai.GenerationConfig(max_new_tokens=8, do_sample=False, apply_chat_template=False)
    assert "Paris" in pipeline.generate("The capital of France is", config)
