"""Does the folder of a class answer as the module of torch that it comes from? For text, pictures, speech: whatever has a class.

Both are called alike, so both are asked alike: one call on an example, and 32 greedy tokens where the class generates. Where the
export has rounded a plain model nothing can be exact: then all devices have to say what the folder says in f32 on the first one,
and what that is away from the source is the rounding's part. Divergence is KL where there are logits, else the squared error of
the output beside its square.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lowbit.errors import LowbitError
from lowbit.openvino.base import OVModel
from lowbit.openvino.comparison import (
    ANSWER,
    EXACT_LIMIT,
    ROUNDED_LIMIT,
    SETTINGS,
    Floats,
    Row,
    Verification,
    alike,
    divergence,
    exact_settings,
    is_tie,
)
from lowbit.openvino.compress import is_compressed
from lowbit.openvino.examples import example_of
from lowbit.openvino.library import device, devices
from lowbit.openvino.sites import low_bit_weights
from lowbit.openvino.traced import load_module

_LOGITS, _IDS, _FEATURES = "logits", "input_ids", "input_features"
_TOKENS = 12


@dataclass(frozen=True)
class _Said:
    """What the head of a model gives, by its name (of several heads all in one row), and the tokens that it makes."""

    name: str
    output: Floats
    tokens: tuple[int, ...]
    seconds: float


def verify_class(
    kind: type[OVModel], folder: str | Path, source: Any, keywords: Mapping[str, Any], on: Iterable[str] | None = None
) -> Verification:
    """Compare the folder of a class with the model that it was exported from, on the devices named or on all that are here."""
    chosen = devices() if on is None else [device(name) for name in on]
    module = load_module(kind.auto_model_class, source, None, keywords).float()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        given = example_of(module, 1, _TOKENS)
    truth = _ask(module, given)
    follow = truth.tokens
    low_bit = getattr(module, "lowbit_report", None) is not None
    limit = ROUNDED_LIMIT if low_bit else EXACT_LIMIT
    del module
    gc.collect()
    rows, rounding = [], None
    for name in chosen:
        for setting in SETTINGS:
            try:
                made = kind._open(
                    Path(folder), device=name, ov_config=exact_settings(name) if setting == "exact" else {}
                )
                said = _ask(made, given, follow)
            except (LowbitError, RuntimeError) as error:
                rows.append(Row(name, setting, error=str(error)))
                continue
            # AWQ rounds the module before it is followed: its codes lie in the graph, and the source beside it is plain.
            if rounding is None and any(is_compressed(g) or (not low_bit and low_bit_weights(g)) for g in made.graphs):
                rounding, truth = _away(truth, said), said
                continue
            rows.append(_row(name, setting, truth, said, limit))
    return Verification(tuple(rows), rounding)


def _ask(model: Any, given: Mapping[str, torch.Tensor], follow: tuple[int, ...] = ()) -> _Said:
    """One call, and greedy tokens of a model that makes them from something else; it is called on those, or on `follow`."""
    started = time.perf_counter()
    generates = model.can_generate() and model.config.is_encoder_decoder
    tokens: tuple[int, ...] = ()
    with torch.no_grad():
        more = {}
        if generates:
            main = {name: given[name] for name in (_IDS, _FEATURES, "attention_mask") if name in given}
            made = model.generate(**main, max_new_tokens=ANSWER, do_sample=False, num_beams=1)
            tokens = tuple(made[0].tolist())
            more = {"decoder_input_ids": torch.tensor([follow or tokens])}
        found = model(**given, **more)
    tensors = {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}
    names = [name for name in tensors if name.endswith(_LOGITS)] or [next(iter(tensors))]
    output = tensors[names[0]] if len(names) == 1 else torch.cat([tensors[name].flatten() for name in names])
    return _Said(" ".join(names), np.asarray(output.float().numpy()), tokens, time.perf_counter() - started)


def _row(name: str, setting: str, truth: _Said, said: _Said, limit: float) -> Row:
    largest = float(np.abs(truth.output).max()) or 1.0
    same_shape = truth.output.shape == said.output.shape
    difference = float(np.abs(said.output - truth.output).max()) / largest if same_shape else np.inf
    same = alike(truth.tokens, said.tokens)
    tie = same_shape and _is_even(truth, said, same, limit)
    return Row(
        name, setting, difference, _away(truth, said), same, len(truth.tokens), tie, limit=limit, seconds=said.seconds
    )


def _is_even(truth: _Said, said: _Said, same: int, limit: float) -> bool:
    """Whether the source finds the first two tokens that differ nearly alike, by the logits that it chose from.

    Those of a call on its tokens are that, unless it generates behind others, as Whisper does: then they chose something else.
    """
    if truth.name != _LOGITS or not 0 < same < min(len(truth.tokens), len(said.tokens)):
        return False
    logits, chosen = truth.output[0, same - 1], truth.tokens[same]
    return int(logits.argmax()) == chosen and is_tie(logits, chosen, said.tokens[same], limit)


def _away(truth: _Said, said: _Said) -> float:
    if truth.output.shape != said.output.shape:
        return float("inf")
    if truth.name == _LOGITS:
        rows = (each.output.reshape(-1, each.output.shape[-1]) for each in (truth, said))
        return divergence(*rows)
    return float(np.square(said.output - truth.output).sum() / (np.square(truth.output).sum() or 1.0))
