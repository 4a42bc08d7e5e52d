"""Beams and guesses: transformers' beam search beam for beam, and the same text sooner with guesses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from cpu.interpreter_engine import InterpreterEngine
from lowbit.errors import LowbitError, RecipeError
from lowbit.runtime import Model, Settings, load
from lowbit.runtime.speculate import PromptLookup
from lowbit_assets import tiny_model

PROMPT = [9, 30, 31, 32, 7]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("llama", tmp_path_factory.mktemp("beams"))


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return load(folder, slots=4, cache="fp32", compute="fp32")


@pytest.fixture(scope="module")
def reference(folder: Path) -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def likely_end(model: Model) -> int:
    """A token that comes soon on several beams."""
    answers = model.beams(PROMPT, max_new_tokens=8, num_beams=4, num_return_sequences=4, ignore_end=True)
    return max({t for a in answers for t in a.tokens[2:6]}, key=lambda t: sum(t in a.tokens for a in answers))


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 4},
        {"num_beams": 2, "length_penalty": 0.0, "early_stopping": "never"},
        {"num_beams": 3, "length_penalty": 0.3, "early_stopping": True},
        {"num_beams": 4, "length_penalty": 2.0, "early_stopping": "never"},
        {"num_beams": 3, "length_penalty": -1.0},
        {"num_beams": 2, "repetition_penalty": 1.3, "min_new_tokens": 6},
    ],
    ids=str,
)
@pytest.mark.parametrize("ends", ["none", "soon", "two"])
def test_beams_equal_transformers(
    settings: dict[str, object], ends: str, model: Model, reference: transformers.PreTrainedModel, likely_end: int
) -> None:
    stops = {"none": [2], "soon": [likely_end], "two": [2, likely_end]}[ends]
    kept = int(settings["num_beams"])  # type: ignore[call-overload]
    expected = reference.generate(
        torch.tensor([PROMPT]), max_new_tokens=14, do_sample=False, num_return_sequences=kept, eos_token_id=stops,
        pad_token_id=0, output_scores=True, return_dict_in_generate=True, **settings,
    )  # fmt: skip
    found = model.beams(PROMPT, max_new_tokens=14, num_return_sequences=kept, stop_tokens=stops, **settings)
    for answer, sequence, score in zip(found, expected.sequences, expected.sequences_scores, strict=True):
        count = len(answer.tokens)
        theirs = sequence[len(PROMPT) :].tolist()
        assert list(answer.tokens) == theirs[:count] and not any(theirs[count:])
        assert answer.score == pytest.approx(float(score), rel=1e-5)
        assert answer.finish == ("stop" if answer.tokens[-1] in stops else "length")


def test_the_best_beam_is_what_generate_returns(model: Model) -> None:
    settings = {"max_new_tokens": 6, "num_beams": 3}
    assert model.generate(PROMPT, **settings).tokens == model.beams(PROMPT, **settings)[0].tokens  # type: ignore[arg-type]


def test_groups_avoid_one_another(model: Model) -> None:
    common = {"max_new_tokens": 6, "num_beams": 4, "num_beam_groups": 2, "num_return_sequences": 4, "ignore_end": True}
    alike = model.beams(PROMPT, diversity_penalty=0.0, **common)
    apart = model.beams(PROMPT, diversity_penalty=50.0, **common)
    two = model.beams(PROMPT, max_new_tokens=6, num_beams=2, num_return_sequences=2, ignore_end=True)
    assert {a.tokens for a in alike} == {a.tokens for a in two}  # both groups search alike
    assert {a.tokens for a in two} < {a.tokens for a in apart}  # the first group is as before
    firsts = [a.tokens[0] for a in apart]
    assert len(set(firsts)) > 1


def search_in_groups(
    reference: transformers.PreTrainedModel, beams: int, groups: int, penalty: float, count: int
) -> list[list[int]]:
    """Diverse beam search as its paper has it, without a cache: of texts that never end, the likeliest of each group."""
    size = beams // groups
    running = [[(0.0, list[int]())] for _ in range(groups)]
    for _ in range(count):
        taken: list[int] = []
        for group in range(groups):
            found = []
            for score, tokens in running[group]:
                logits = reference(torch.tensor([[*PROMPT, *tokens]])).logits[0, -1]
                next_scores = torch.log_softmax(logits, -1) - penalty * torch.bincount(
                    torch.tensor(taken, dtype=torch.long), minlength=len(logits)
                )
                found += [(score + float(more), [*tokens, token]) for token, more in enumerate(next_scores)]
            running[group] = sorted(found, key=lambda text: -text[0])[:size]
            taken += [tokens[-1] for _, tokens in running[group]]
    return [tokens for _, tokens in sorted((text for group in running for text in group), key=lambda text: -text[0])]


@pytest.mark.parametrize(("groups", "penalty"), [(2, 0.4), (4, 1.5)])
def test_groups_search_as_defined(
    groups: int, penalty: float, model: Model, reference: transformers.PreTrainedModel
) -> None:
    with torch.inference_mode():
        expected = search_in_groups(reference, 4, groups, penalty, 5)
    found = model.beams(
        PROMPT,
        max_new_tokens=5,
        num_beams=4,
        num_beam_groups=groups,
        diversity_penalty=penalty,
        num_return_sequences=4,
        ignore_end=True,
    )
    assert [list(answer.tokens) for answer in found] == expected


def test_beams_read_their_common_start_once(folder: Path) -> None:
    engine = InterpreterEngine.open(folder, slots=3)
    Model(engine).beams(PROMPT, max_new_tokens=8, num_beams=3, ignore_end=True)
    assert engine.read == len(PROMPT) + 3 * 7  # what splits off is copied, never read again


def test_groups_of_beams_copy_the_prompt(folder: Path) -> None:
    engine = InterpreterEngine.open(folder, slots=4)
    settings = {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0}
    Model(engine).beams(PROMPT, max_new_tokens=6, ignore_end=True, **settings)
    assert engine.read <= len(PROMPT) + 2 + 4 * 5


def test_beams_refuse_what_they_cannot_do(model: Model) -> None:
    with pytest.raises(RecipeError, match="beam search draws nothing"):
        model.beams(PROMPT, num_beams=2, temperature=0.5)
    with pytest.raises(RecipeError, match="no stop strings"):
        model.beams(PROMPT, num_beams=2, stop="x")
    with pytest.raises(LowbitError, match="no text before its end"):
        model.stream(PROMPT, num_beams=2)


# --- guesses ---------------------------------------------------------------------------------------------------------


def test_lookup_finds_what_followed_last_time() -> None:
    lookup = PromptLookup(3)
    assert lookup(np.array([1, 2, 3, 4, 5, 6, 1, 2, 3], np.int32), 10) == [4, 5, 6]
    assert lookup(np.array([1, 2, 8, 1, 2, 9, 1, 2], np.int32), 10) == [9, 1, 2]  # the latest place
    assert lookup(np.array([1, 2, 3, 4, 5, 6, 1, 2, 3], np.int32), 1) == [4]
    assert lookup(np.array([1, 2, 3, 4], np.int32), 10) == []
    assert lookup(np.array([7], np.int32), 10) == []


class Noisy(InterpreterEngine):
    """Right about one token in three."""

    def decode(self, token: int, slot: int = 0) -> np.ndarray:
        return np.roll(super().decode(token, slot), len(self.held[slot]) % 3)


@pytest.fixture(scope="module")
def noisy(folder: Path) -> Model:
    return Model(Noisy.open(folder))


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.8, "seed": 3}, {"repetition_penalty": 1.2}], ids=str)
def test_guesses_change_no_token(settings: dict[str, float], model: Model, noisy: Model) -> None:
    prompt = PROMPT * 4
    plain = model.generate(prompt, max_new_tokens=20, ignore_end=True, **settings)
    looked = model.generate(prompt, max_new_tokens=20, ignore_end=True, prompt_lookup_num_tokens=6, **settings)
    drafted = model.generate(prompt, max_new_tokens=20, ignore_end=True, draft=noisy, **settings)
    assert looked.tokens == plain.tokens
    assert drafted.tokens == plain.tokens


def test_right_guesses_save_steps(folder: Path) -> None:
    class Counting(InterpreterEngine):
        steps = 0

        def step(self, tokens, slots):  # type: ignore[no-untyped-def]
            self.steps += 1
            return super().step(tokens, slots)

    engine = Counting.open(folder)
    model = Model(engine, settings=Settings(max_new_tokens=18, ignore_end=True))
    plain = model.generate(PROMPT).tokens
    engine.steps = 0
    draft = Model(InterpreterEngine.open(folder))
    assert (
        Model(engine, settings=model.settings).generate([*PROMPT], draft=draft, num_assistant_tokens=5).tokens == plain
    )
    assert engine.steps <= 5  # the prompt, and rounds of six: five guesses and one token more


def test_a_draft_of_another_vocabulary_is_refused(model: Model, tmp_path: Path) -> None:
    other = load(tiny_model("llama", tmp_path, vocab_size=300))
    with pytest.raises(LowbitError, match="the draft model knows 300 tokens and this one 288"):
        model.generate(PROMPT, draft=other)
