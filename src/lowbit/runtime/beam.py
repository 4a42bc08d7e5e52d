"""Beam search: the likeliest texts, not the likeliest next token.

    score(text of n tokens) = sum of log p(token | what came before) / n^length_penalty

Each step reads one token of every beam in one step of the engine, so that the weights are read once. Of all
continuations the best 2 * beams are looked at (more where several tokens can end a text): those that end are kept as
finished if they stand among the best `beams`, the others go on. These are the rules of transformers' search, and its
results.

The beams share their prompt and mostly their later tokens too, and each has a slot of the engine. A beam that goes on
keeps the slot of the beam it came from; where one splits in two, the second takes a slot that is free, and what that
lacks is copied from the first one's: the prompt is read once, and later only tokens that differ move. Several groups
search one after another at each step, and a token costs `diversity_penalty` for each time an earlier group has just
chosen it (Vijayakumar et al., arXiv 1610.02424).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from lowbit.errors import RecipeError
from lowbit.runtime.generation import log_softmax
from lowbit.runtime.selection import Selector
from lowbit.runtime.settings import BeamSettings, Settings
from lowbit.runtime.slots import Floats, Slot, Tokens


@dataclass(frozen=True)
class Beam:
    """A text under way or finished: its new tokens, their log probability, and the slot that holds what it came from."""

    tokens: tuple[int, ...]
    score: float
    slot: int = 0


@dataclass
class Group:
    """Beams that search together."""

    beams: int
    running: list[Beam]
    finished: list[Beam] = field(default_factory=list)
    done: bool = False


def search(
    slots: Sequence[Slot],
    prompt: Tokens,
    settings: Settings,
    seen: Tokens | None = None,
    after_step: Callable[[], None] | None = None,
) -> list[Beam]:
    """The best finished texts, best first; `score` is the penalised one. Needs a slot for each beam.

    `seen` stands for the prompt where penalties count tokens: a padded prompt counts its padding in transformers. `after_step` is
    called when a token of every beam was chosen.
    """
    seen = prompt if seen is None else seen
    beams = settings.beams
    _refuse(slots, settings)
    selector = Selector(settings.selection, settings.ends)
    size = beams.num_beams // beams.num_beam_groups
    groups = [Group(size, [Beam((), 0.0, slot=g * size)]) for g in range(beams.num_beam_groups)]
    room = min(settings.max_new_tokens, slots[0].engine.context - len(prompt))
    for made in range(1, room + 1):
        active = [beam for group in groups if not group.done for beam in group.running]
        logits = _read(slots, prompt, active)
        chosen = np.zeros(logits.shape[-1], np.float32)  # how often a token was chosen by the groups so far
        at = 0
        for group in groups:
            if group.done:
                continue
            rows = logits[at : at + len(group.running)]
            at += len(group.running)
            next_tokens = _step(
                group,
                _scores(rows, group.running, seen, selector) - beams.diversity_penalty * chosen,
                settings,
                made == room,
            )
            group.done = made == room or _is_done(group, beams, made, room)
            for token in next_tokens:
                chosen[token] += 1
        if after_step is not None:
            after_step()
        if all(group.done for group in groups):
            break
        _assign_slots(groups, slots, prompt)
    return sorted((beam for group in groups for beam in group.finished), key=lambda beam: -beam.score)


def _refuse(slots: Sequence[Slot], settings: Settings) -> None:
    if len(slots) < settings.beams.num_beams:
        raise RecipeError(
            f"{settings.beams.num_beams} beams need as many slots and the model has {len(slots)}: "
            f"load it with slots={settings.beams.num_beams}"
        )
    if settings.selection.temperature:
        raise RecipeError("beam search draws nothing: set temperature=0, or num_beams=1 to draw")
    if settings.stop:
        raise RecipeError("beam search knows no stop strings: name stop_tokens, or set num_beams=1")


def _scores(logits: Floats, beams: Sequence[Beam], prompt: Tokens, selector: Selector) -> Floats:
    """The log probabilities [beams, vocabulary] with the settings applied to them."""
    scores = log_softmax(logits)
    for row, beam in zip(scores, beams, strict=True):
        selector.adjust_(row, np.concatenate([prompt, np.asarray(beam.tokens, np.int32)]), len(beam.tokens))
    return scores


def _step(group: Group, log_probabilities: Floats, settings: Settings, at_the_end: bool) -> list[int]:
    """Choose the next tokens of a group, and sort its beams into finished and running; the tokens that end nothing."""
    ends, penalty = settings.ends, settings.beams.length_penalty
    total = log_probabilities + np.asarray([beam.score for beam in group.running], np.float32)[:, None]
    looked_at = min(max(2, 1 + len(ends)) * group.beams, total.size)
    best = np.argpartition(-total, looked_at - 1, axis=None)[:looked_at]
    flat = total.reshape(-1)
    best = best[np.lexsort((best, -flat[best]))]
    running: list[Beam] = []
    for rank, index in enumerate(best):
        parent, token = divmod(int(index), total.shape[-1])
        source = group.running[parent]
        beam = Beam((*source.tokens, token), float(flat[index]), source.slot)
        if (token in ends or at_the_end) and rank < group.beams:
            length = len(beam.tokens)
            group.finished.append(Beam(beam.tokens, beam.score / length**penalty, beam.slot))
        if token not in ends and len(running) < group.beams:
            running.append(beam)
    group.running = [] if at_the_end else running
    group.finished = sorted(group.finished, key=lambda beam: -beam.score)[: group.beams]
    return [beam.tokens[-1] for beam in running]


def _is_done(group: Group, settings: BeamSettings, made: int, room: int) -> bool:
    """Whether no running beam is worth going on with."""
    if not group.running:
        return True
    if len(group.finished) < group.beams:
        return False
    if settings.early_stopping is True:
        return True
    length = room if settings.early_stopping == "never" and settings.length_penalty > 0 else made
    return bool(group.running[0].score / length**settings.length_penalty <= group.finished[-1].score)


def _assign_slots(groups: Sequence[Group], slots: Sequence[Slot], prompt: Tokens) -> None:
    """Give every running beam a slot of its own: the first child its parent's, the others those that are free."""
    free = set(range(len(slots)))
    for group in groups:
        if not group.done:
            free -= {beam.slot for beam in group.running}
    for group in groups:
        if group.done:
            continue
        taken: set[int] = set()
        for index, beam in enumerate(group.running):
            if beam.slot in taken:
                whole = np.concatenate([prompt, np.asarray(beam.tokens, np.int32)])
                number = max(free, key=lambda n: (slots[n].common(whole), -n))
                free.discard(number)
                group.running[index] = Beam(beam.tokens, beam.score, number)
            taken.add(group.running[index].slot)


def _read(slots: Sequence[Slot], prompt: Tokens, beams: Sequence[Beam]) -> Floats:
    """The logits after each beam, [beams, vocabulary]: what slots lack is copied or read first, then one token of each
    in one step."""
    wholes = [np.concatenate([prompt, np.asarray(beam.tokens, np.int32)]) for beam in beams]
    logits: dict[int, Floats] = {}
    lasts: dict[int, int] = {}
    for index, (beam, whole) in enumerate(zip(beams, wholes, strict=True)):
        own = slots[beam.slot]
        fullest = max(slots, key=lambda slot: slot.common(whole))
        if fullest.common(whole) > own.common(whole):
            own.copy(fullest, whole)
        if len(beams) == 1 or not own.may_split(whole):
            logits[index] = own.advance(whole)
        else:
            lasts[index] = own.hold_all_but_last(whole)
    if lasts:
        numbers = [slots[beams[index].slot].number for index in lasts]
        found = slots[0].engine.step(np.asarray(list(lasts.values()), np.int32), np.asarray(numbers, np.int32))
        if not logits:
            return found
        logits.update(zip(lasts, found, strict=True))
    return np.stack([logits[index] for index in range(len(beams))])
