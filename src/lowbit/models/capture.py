"""Capture: find the repeated blocks of a model, and run it block by block.

    find_blocks   which modules the hidden state passes one after another      found by running, not by class names
    first_calls   what the first block is called with, one Call for each batch; the model stops there
    next_calls    what the next block is called with, once the outputs of this one are known
    watch_block   what some modules of a block are called with; the block stops there

A Call is everything that a block is called with. Its hidden state changes from block to block, and so may what it gets
beside that (masks of sliding windows, position embeddings by kind of layer): `record_calls` runs the model once to see
it. What depends both on the block and on the tokens cannot be kept for all of them, and is refused.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from lowbit.errors import CheckpointError, RecipeError, one_line
from lowbit.models.past import PAST_NAMES

_PROBE_TOKENS = 8
# A cache would remember every time that a block is run, and a block is run several times.
_CACHES = (*PAST_NAMES, "past_key_value", "layer_past", "cache_params")


@dataclass(frozen=True)
class Stored:
    """A tensor on disk, mapped from its file when it is read. A new one at the same place leaves what was mapped as it is."""

    path: Path
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def save(cls, tensor: torch.Tensor, path: Path) -> Stored:
        path.unlink(missing_ok=True)  # to write into a file that is mapped would end the process
        try:
            np.save(path, tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
        except OSError as error:  # numpy tells how many numbers were written, and not why no more
            raise CheckpointError(
                f"{path.parent} has no room for the activations of a block ({one_line(str(error))}): spill them to a folder on "
                "another disk, or give fewer samples"
            ) from None
        return cls(path, tensor.dtype, tensor.device)

    def load(self) -> torch.Tensor:
        mapped = np.load(self.path, mmap_mode="c")
        return torch.from_numpy(mapped).view(self.dtype).to(self.device)


def loaded(kept: torch.Tensor | Stored) -> torch.Tensor:
    """A tensor that may lie on disk."""
    return kept.load() if isinstance(kept, Stored) else kept


@dataclass(frozen=True)
class Call:
    """One batch's input of a block. `slot` is the place of the hidden state among the arguments, or its keyword."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    slot: int | str = 0

    @property
    def hidden(self) -> torch.Tensor:
        return loaded(self._stored)

    @property
    def _stored(self) -> Any:
        return self.args[self.slot] if isinstance(self.slot, int) else self.kwargs[self.slot]

    def with_hidden(self, hidden: torch.Tensor | Stored | None) -> Call:
        if isinstance(self.slot, int):
            args = (*self.args[: self.slot], hidden, *self.args[self.slot + 1 :])
            return replace(self, args=args)
        return replace(self, kwargs=self.kwargs | {self.slot: hidden})

    def beside(self) -> dict[int | str, Any]:
        """All that a block gets beside the hidden state, by place or keyword."""
        everything: dict[int | str, Any] = dict(enumerate(self.args)) | self.kwargs
        return {place: value for place, value in everything.items() if place != self.slot}

    def with_beside(self, values: dict[int | str, Any]) -> Call:
        """The same hidden state with other values beside it."""
        args = tuple(values.get(i, value) for i, value in enumerate(self.args))
        return replace(self, args=args, kwargs=self.kwargs | {k: v for k, v in values.items() if isinstance(k, str)})


# The arguments and the keywords of a call.
Given = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Pass:
    """One run of a block: what modules were called with, in the order of their first calls, and the hidden state that it
    gave; None where it was stopped before."""

    given: dict[nn.Module, list[Given]]
    output: torch.Tensor | None


class _StoppedError(Exception):
    """Ends a forward once what was wanted of it has been seen."""


def run_block(block: nn.Module, call: Call) -> torch.Tensor:
    """The hidden state that a block gives: its output, or the first of several."""
    hidden = call.with_hidden(call.hidden)
    with torch.no_grad():
        output = block(*hidden.args, **hidden.kwargs)
    first = output[0] if isinstance(output, tuple | list) else output
    if not isinstance(first, torch.Tensor):
        raise RecipeError(
            f"a {type(block).__name__} gives a {type(first).__name__} and no hidden state, "
            "so the model cannot be run block by block: use the rounder rtn without calibration"
        )
    return first


def watch_block(block: nn.Module, call: Call, visits: Mapping[nn.Module, int]) -> Pass:
    """Run a block and note what some of its modules are called with.

    `visits` says how often each is called in one run: at the last of these calls the run ends, and nothing behind it is
    computed. 0 means that nobody knows: then it goes to the end.
    """
    given: dict[nn.Module, list[Given]] = {}
    stops = all(visits.values())

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given.setdefault(module, []).append((args, kwargs))
        if stops and all(len(given.get(wanted, ())) >= count for wanted, count in visits.items()):
            raise _StoppedError

    with _removing([module.register_forward_pre_hook(hook, with_kwargs=True) for module in visits]):
        try:
            return Pass(given, run_block(block, call))
        except _StoppedError:
            return Pass(given, None)


def watch_calls(block: nn.Module, calls: Iterable[Call], modules: Iterable[nn.Module]) -> Iterator[Pass]:
    """`watch_block` for several calls: the first run goes to its end and counts, the others stop where it saw the last."""
    visits = dict.fromkeys(modules, 0)
    for call in calls:
        seen = watch_block(block, call, visits)
        yield seen
        if not all(visits.values()):
            visits = {module: len(seen.given.get(module, ())) for module in visits}


def next_calls(calls: list[Call], outputs: list[torch.Tensor]) -> list[Call]:
    """The calls of the next block, where all blocks get the same beside the hidden state."""
    return [call.with_hidden(output) for call, output in zip(calls, outputs, strict=True)]


def find_blocks(model: nn.Module, ids: torch.Tensor | None = None) -> list[str]:
    """The paths of the blocks that the tokens pass one after another: of all such lists, the one with the most weights."""
    batch = torch.zeros(1, _PROBE_TOKENS, dtype=torch.long) if ids is None else ids[:1, :_PROBE_TOKENS]
    lists = {
        path: [f"{path}.{name}" if path else name for name, _ in module.named_children()]
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList | nn.Sequential) and len(module)
    }
    members = {name for names in lists.values() for name in names}
    seen: dict[str, list[tuple[Any, Any]]] = {name: [] for name in members}

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            seen[name].append((_hidden_of(args, kwargs), output[0] if isinstance(output, tuple | list) else output))

        return hook

    hooks = [model.get_submodule(n).register_forward_hook(note(n), with_kwargs=True) for n in sorted(members)]
    with _removing(hooks):
        _run(model, batch)
    chains = [names for names in lists.values() if _is_chain([seen[name] for name in names])]
    usable = [names for names in chains if all(any(model.get_submodule(n).children()) for n in names)]
    if not usable:
        raise RecipeError(
            f"no blocks were found in this {type(model).__name__} that its tokens pass one after another, "
            "so it cannot be calibrated block by block: use the rounder rtn without calibration"
        )
    return max(usable, key=lambda names: sum(p.numel() for n in names for p in model.get_submodule(n).parameters()))


def first_calls(model: nn.Module, batches: list[torch.Tensor], blocks: list[str] | None = None) -> list[Call]:
    """What the first block is called with for each batch of token ids [n, length]."""
    names = blocks or find_blocks(model, batches[0])
    calls = []
    for batch in batches:
        calls += record_calls(model, names[:1], batch)
    return calls


def record_calls(model: nn.Module, blocks: list[str], batch: torch.Tensor) -> list[Call]:
    """What each of some blocks is called with; the model stops when it reaches the last of them."""
    calls: list[Call] = []

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kept = {name: None if name in _CACHES else value for name, value in kwargs.items()}
        calls.append(Call(args, kept, _slot_of(args, kept)))
        if len(calls) == len(blocks):
            raise _StoppedError

    hooks = [model.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True) for name in blocks]
    with _removing(hooks):
        try:
            _run(model, batch)
        except _StoppedError:
            return calls
    raise RecipeError(f"the model ended before its tokens reached {blocks[-1]}, so it cannot be run block by block")


def beside_of_blocks(model: nn.Module, blocks: list[str], batches: list[torch.Tensor]) -> list[dict[int | str, Any]]:
    """For each block, what it gets beside the hidden state that the first block does not get.

    Mostly that is nothing. One row of a batch is enough to see it, where whole batches cost a 20th of a calibration.
    """
    found = _beside_of_blocks(model, blocks, [batch[:1] for batch in batches[:2]])
    return _beside_of_blocks(model, blocks, batches[:2]) if any(found) else found


def _beside_of_blocks(model: nn.Module, blocks: list[str], batches: list[torch.Tensor]) -> list[dict[int | str, Any]]:
    recorded = [[call.beside() for call in record_calls(model, blocks, batch)] for batch in batches]
    found = []
    for index, name in enumerate(blocks):
        first, own = recorded[0][0], recorded[0][index]
        other = {place: value for place, value in own.items() if not _same(value, first.get(place))}
        for place in other:
            if not _same(other[place], recorded[-1][index].get(place)):
                raise RecipeError(
                    f"{name} gets an argument ({place}) that depends on the tokens and differs from block to block, "
                    "so the model cannot be calibrated block by block: use the rounder rtn without calibration"
                )
        found.append(other)
    return found


def _run(model: nn.Module, batch: torch.Tensor) -> None:
    device = next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    known = inspect.signature(model.forward).parameters
    options: dict[str, Any] = {"use_cache": False} if "use_cache" in known else {}
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        options["decoder_input_ids"] = batch.to(device)
    with torch.no_grad():
        model(batch.to(device), **options)


@contextmanager
def _removing(hooks: list[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _hidden_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    found = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
    return found[0] if found else None


def _slot_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | str:
    """Where the hidden state is: the first tensor of floating point numbers."""
    places: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    for place, value in places:
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            return place
    raise RecipeError("the first block gets no hidden state, so the model cannot be run block by block")


def _is_chain(visits: list[list[tuple[Any, Any]]]) -> bool:
    """Whether every module ran once, and each began with what the one before it gave."""
    if not all(len(visit) == 1 and isinstance(visit[0][1], torch.Tensor) for visit in visits):
        return False
    pairs = [(before[0][1], after[0][0]) for before, after in itertools.pairwise(visits)]
    return all(isinstance(x, torch.Tensor) and x.shape == y.shape and torch.equal(x, y) for y, x in pairs)


def _same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, tuple | list) and type(a) is type(b) and len(a) == len(b):
        return all(_same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return all(_same(a[key], b[key]) for key in a)
    return type(a) is type(b) and isinstance(a, str | int | float | bool) and bool(a == b)
