"""Block by block: every linear of a model rounded on what it gets when the blocks before it are rounded already.

    for each block:   calls -> scaler folds -> statistics -> rounder -> W^ in place -> outputs = calls of the next block

The activations of one block are in memory at a time (or, with `spill`, in files), and one Hessian for each tensor that
linears share. While a block is worked on W^ stands in the dense module: what the next block gets is then what the
definition says, on every device, and low-bit modules come in once the block is finished.

    inputs     which linears share an input, and what they get; no pass computes more than it is made for
    rounding   one block                     weights    which of its weights together
    experts    fused experts                 reading    blocks that are read from files when it is their turn
    resume     finished blocks in a folder
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowbit.algorithms import ROUNDERS
from lowbit.blockwise.reading import Source, giving_back, let_go_, read_block_
from lowbit.blockwise.resume import ResumeFolder
from lowbit.blockwise.rounding import BlockRounding, Job
from lowbit.blockwise.weights import Chosen, describe_packed
from lowbit.calibration import Calibration
from lowbit.errors import RecipeError
from lowbit.models.capture import Call, Stored, beside_of_blocks, find_blocks, first_calls, loaded, run_block
from lowbit.progress import Advance
from lowbit.recipe import Recipe
from lowbit.report import LayerReport
from lowbit.swap import low_bit_module, replace_module

__all__ = ["Chosen", "Where", "check_data", "describe_packed", "round_in_blocks_"]


@dataclass(frozen=True)
class Where:
    """Where a run keeps what it must not lose (`resume`) and what does not fit into memory (`spill`), and the files that
    the model is mapped from, if nobody else has it (`source`)."""

    resume: str | Path | None = None
    spill: str | Path | None = None
    source: Source | None = None


def check_data(recipe: Recipe, calibration: Any) -> None:
    """Refuse a recipe without the data that it needs, and data that would change nothing."""
    if calibration is None and recipe.asks_for_data:
        fixed = recipe.fixed_format
        name = recipe.scaler or (recipe.rounder if fixed is None else f"{fixed}")
        raise RecipeError(
            f"{name} looks at activations and needs calibration tokens: give calibration=, or --calibration FILE"
        )
    if calibration is not None and not recipe.uses_data:
        raise RecipeError(
            f"the rounder {recipe.rounder} looks at no activations: leave the calibration out, or take the rounder rtn or gptq"
        )


def round_in_blocks_(
    model: nn.Module,
    chosen: list[Chosen],
    recipe: Recipe,
    calibration: Calibration,
    where: Where,
    advance: Advance,
) -> list[LayerReport]:
    """Round the chosen weights that lie in the blocks of a model, in place; returns their lines of the report."""
    _check_vocabulary(model, calibration)
    if where.spill is not None:
        Path(where.spill).mkdir(parents=True, exist_ok=True)
    training = model.training
    model.eval()
    with torch.no_grad(), tempfile.TemporaryDirectory(dir=where.spill, prefix="lowbit-") as scratch:
        with giving_back(model, where.source):
            folder = None
            if where.resume is not None:
                folder = ResumeFolder(Path(where.resume).expanduser(), model, recipe, calibration)
            run = _Run(model, chosen, recipe, calibration, Path(scratch) if where.spill else None, advance)
            run.source = where.source
            if folder is not None:
                run.resume_(folder)
        rows = run.run_()
    model.train(training)
    return rows


class _Run:
    def __init__(
        self,
        model: nn.Module,
        chosen: list[Chosen],
        recipe: Recipe,
        calibration: Calibration,
        scratch: Path | None,
        advance: Advance,
    ) -> None:
        self.model, self.recipe, self.scratch, self.advance = model, recipe, scratch, advance
        self.job = Job(model, recipe, calibration.tokens.numel(), self._keep_tensor, advance)
        self.blocks = find_blocks(model, calibration.tokens)
        self.chosen = {
            name: {c.target.path.removeprefix(f"{name}."): c for c in chosen if c.target.path.startswith(f"{name}.")}
            for name in self.blocks
        }
        batches = calibration.batches()
        self.beside = beside_of_blocks(model, self.blocks, batches)
        self.common: list[dict[int | str, Any]] = []
        self.calls: list[Call] = []
        for batch in batches:
            for call in first_calls(model, [batch], self.blocks):
                self.common.append(call.beside())
                self.calls.append(self._keep(call, call.hidden, f"calls_{len(self.calls)}"))
        # The stream of the model in full precision, beside that of the rounded one.
        self.full_calls = list(self.calls) if ROUNDERS[recipe.rounder].full(recipe.rounder_options) else []
        self.folder: ResumeFolder | None = None
        self.source: Source | None = None
        self.done = 0
        self.rows: list[LayerReport] = []

    def _keep(self, call: Call, hidden: torch.Tensor, name: str) -> Call:
        return call.with_hidden(self._keep_tensor(hidden, name))

    def _keep_tensor(self, tensor: torch.Tensor, name: str) -> torch.Tensor | Stored:
        return tensor if self.scratch is None else Stored.save(tensor, self.scratch / f"{name}.npy")

    def resume_(self, folder: ResumeFolder) -> None:
        """Put finished blocks in place and go on behind them."""
        self.folder = folder
        folder.begin()
        self.done = min(folder.finished, len(self.blocks))
        for index, name in enumerate(self.blocks[: self.done]):
            targets = [c.target for c in self.chosen[name].values()]
            dense = read_block_(self.model.get_submodule(name), self.source)
            self.rows += folder.restore_block_(index, name, self.model, targets)
            let_go_(dense, self.model.get_submodule(name), self.source)
            for target in targets:
                self.advance(target.path, ready=True)
        if 0 < self.done < len(self.blocks):
            hidden = folder.hidden(self.done - 1, self.calls[0].hidden.device)
            self.calls = [self._keep(c, hidden[f"calls_{i}"], f"calls_{i}") for i, c in enumerate(self.calls)]
            self.full_calls = [self._keep(c, hidden[f"full_{i}"], f"full_{i}") for i, c in enumerate(self.full_calls)]

    def run_(self) -> list[LayerReport]:
        for index in range(self.done, len(self.blocks)):
            self.rows += self._round_block_(index)
        return self.rows

    def _round_block_(self, index: int) -> list[LayerReport]:
        name, beside = self.blocks[index], self.beside[index]
        self.calls = [c.with_beside(common | beside) for c, common in zip(self.calls, self.common, strict=True)]
        self.full_calls = [c.with_beside(o.beside()) for c, o in zip(self.full_calls, self.calls, strict=False)]
        last = index == len(self.blocks) - 1
        block = self.model.get_submodule(name)
        dense = read_block_(block, self.source)
        rounding = BlockRounding(self.job, name, self.chosen[name], self.calls, self.full_calls, last)
        rounding.round_()
        self._move_on(rounding)
        for path, weights in rounding.packed.items():
            target = rounding.chosen[path].target
            replace_module(self.model, target.path, low_bit_module(target, weights))
        let_go_(dense, block, self.source)
        if self.folder is not None:
            hidden = {f"calls_{i}": call.hidden for i, call in enumerate(self.calls)}
            hidden |= {f"full_{i}": call.hidden for i, call in enumerate(self.full_calls)}
            self.folder.save_block(index, name, self.model, rounding.rows, {} if last else hidden)
        return rounding.rows

    def _move_on(self, done: BlockRounding) -> None:
        """What the next block is called with. Nobody asks what the last one gives."""
        if done.last:
            return
        if self.full_calls:
            for i, call in enumerate(self.full_calls):
                target = loaded(done.targets[i]) if done.targets else run_block(done.block, call)
                self.full_calls[i] = self._keep(call, target, f"full_{i}")
        for i, call in enumerate(self.calls):
            output = loaded(done.outputs[i]) if done.outputs else run_block(done.block, call)
            self.calls[i] = self._keep(call, output, f"calls_{i}")


def _check_vocabulary(model: nn.Module, calibration: Calibration) -> None:
    method = getattr(model, "get_input_embeddings", None)
    embedding = method() if callable(method) else None
    known, largest = getattr(embedding, "num_embeddings", None), int(calibration.tokens.max())
    if known is not None and largest >= known:
        raise RecipeError(
            f"the calibration tokens go up to {largest} and the model knows {known}: they are of another tokenizer"
        )
