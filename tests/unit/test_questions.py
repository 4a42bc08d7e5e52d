"""Questions made from WordNet's files: what is asked, and that a model which knows the words finds them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lowbit.cli import FAILED, OK, main
from lowbit.cli.evaluate import WORDNET
from lowbit.errors import CheckpointError, RecipeError
from lowbit.questions import Question, answer_questions, read_questions
from lowbit_assets import tiny_model

ANIMALS = ("cat", "dog", "cow", "hen", "pig")
FOOD = ("bread", "rice")


@pytest.fixture(scope="module")
def wordnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files as WordNet's: five frequent animals, a rare one, and two foods, too few to be asked about."""
    folder = tmp_path_factory.mktemp("wordnet")
    lines = ["  1 This is where the licence stands."]
    counts = ["run%2:38:00:: 1 106"]
    for file, words in (("05", ANIMALS), ("13", FOOD)):
        for word in words:
            lines.append(f'00001740 {file} n 02 {word} 0 the_{word} 1 000 | what a {word} is; "look, a {word}"  ')
            counts.append(f"{word}%1:{file}:00:: 1 7")
    lines.append("00001741 05 n 01 okapi 0 000 | what an okapi is  ")
    counts.append("okapi%1:05:00:: 1 1")
    (folder / "data.noun").write_text("\n".join(lines) + "\n")
    (folder / "cntlist.rev").write_text("\n".join(counts) + "\n")
    return folder


def test_what_is_asked(wordnet: Path) -> None:
    questions = read_questions(wordnet)
    assert sorted(question.gloss for question in questions) == sorted(f"what a {word} is" for word in ANIMALS)
    for question in questions:
        assert len(set(question.words)) == 4 and set(question.words) <= set(ANIMALS)
        assert question.gloss == f"what a {question.words[question.answer]} is"
    assert read_questions(wordnet) == questions
    assert read_questions(wordnet, seed=1) != questions
    assert read_questions(wordnet, count=2) and len(read_questions(wordnet, count=2)) == 2


def test_a_model_that_repeats_words_finds_them() -> None:
    """Every token that was seen already is likelier: the words of the definition gain, and nothing else does."""
    questions = [Question("the cat sat", ("dog", "cat"), 1), Question("a hen", ("hen", "cow"), 0)]

    def logits(ids: torch.Tensor) -> torch.Tensor:
        seen = torch.zeros(ids.shape[1], 300)
        for place in range(ids.shape[1]):
            seen[place:, ids[0, place]] += 1
        return seen[None]

    found = answer_questions(logits, lambda text: list(text.encode()), questions)
    assert found.chosen == (1, 0) and found.accuracy == 1 and found.standard_error == 0
    backwards = answer_questions(lambda ids: -logits(ids), lambda text: list(text.encode()), questions)
    assert backwards.accuracy == 0 and found.same(backwards) == 0 and found.same(found) == 1


def test_files_that_are_not_there_are_named(tmp_path: Path, wordnet: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no data\.noun of WordNet: install Debian's wordnet-base"):
        read_questions(tmp_path)
    (tmp_path / "data.noun").write_text("")
    (tmp_path / "cntlist.rev").write_text("")
    with pytest.raises(RecipeError, match="hold no questions"):
        read_questions(tmp_path)


def test_evaluate_asks_questions(wordnet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(tiny_model("llama", tmp_path / "dense"))
    words = ["evaluate", model, "--questions", str(wordnet), "--question-count", "3", "--against", model]
    assert main([*words, "--json"]) == OK
    found = json.loads(capsys.readouterr().out)["questions"]
    assert found["count"] == 3 and found["same_answer"] == 1 and found["accuracy"] == found["original_accuracy"]
    assert main(words) == OK
    assert "of 3 are right" in capsys.readouterr().out
    assert main(["evaluate", model, "--questions", str(tmp_path)]) == FAILED
    assert "has no data.noun of WordNet" in capsys.readouterr().err
    if not (WORDNET / "data.noun").exists():
        assert main(["evaluate", model, "--questions", "--question-count", "2"]) == FAILED
        assert f"{WORDNET} has no data.noun of WordNet" in capsys.readouterr().err
