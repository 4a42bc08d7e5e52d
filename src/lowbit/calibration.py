"""Calibration: the tokens that activations are collected on, as windows [n, length] of one text.

    calibration_from("manual.txt", tokenizer)         a text file
    calibration_from(["one text", "another"])         texts
    calibration_from(ids)                             token ids: rows of windows, or one long row that is cut
    calibration_from("default", tokenizer)            the text that comes with lowbit: SQLite's manual, public domain
    calibration_from("chitchat", tokenizer)           another of `texts.TEXT_NAMES`

Windows are spread evenly over the text, because a manual or a novel changes its subject as it goes.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lowbit.configs.base import PILE, CalibrationText
from lowbit.errors import RecipeError
from lowbit.evaluate import token_ids
from lowbit.options import LENGTH, SAMPLES
from lowbit.progress import progress
from lowbit.texts import CALIBRATING, TEXT_NAMES, named_text

_LARGEST_BATCH = 8
OWN_TEXT = "own"
OWN_TEXT_FORMAT = "int8"  # writes as the model would, three times as fast


@dataclass(frozen=True, eq=False)
class Calibration:
    """Windows of tokens [n, length], and where they came from."""

    tokens: torch.Tensor
    source: str = "tokens"

    def __post_init__(self) -> None:
        kind = self.tokens.dtype
        if self.tokens.dim() != 2 or not self.tokens.numel() or kind.is_floating_point or kind == torch.bool:
            raise RecipeError(
                f"calibration tokens are whole numbers [windows, length], not {kind} {list(self.tokens.shape)}"
            )
        if int(self.tokens.min()) < 0:
            raise RecipeError("calibration tokens hold a negative number, which no token has: leave padding out")

    @property
    def digest(self) -> str:
        """A name for these very tokens."""
        data = self.tokens.to(torch.int64).contiguous().numpy().tobytes()
        return hashlib.sha256(f"{list(self.tokens.shape)}".encode() + data).hexdigest()[:16]

    def batches(self, largest: int = _LARGEST_BATCH) -> list[torch.Tensor]:
        """The windows in batches of one size, so that what a block gets beside its hidden state has one shape."""
        count = len(self.tokens)
        size = next(size for size in range(min(largest, count), 0, -1) if count % size == 0)
        return list(torch.split(self.tokens, size))

    def __str__(self) -> str:
        return f"{self.source}, {len(self.tokens)} x {self.tokens.shape[1]} tokens ({self.digest})"


def calibration_from(source: Any, tokenizer: Any = None, samples: int = SAMPLES, length: int = LENGTH) -> Calibration:
    """Calibration tokens from a file, texts, token ids, or the name of a text."""
    if isinstance(source, Calibration):
        return source
    if isinstance(source, CalibrationText):
        return calibration_from(source.source, source.tokenizer or tokenizer, source.samples, source.length)
    if samples < 1 or length < 2:
        raise RecipeError(f"calibration takes at least 1 window of at least 2 tokens, not {samples} of {length}")
    if isinstance(source, str | Path):
        text, name = _read_text(source)
        return _cut(_tokens(tokenizer, [text], name), samples, length, name)
    if isinstance(source, Sequence) and source and all(isinstance(text, str) for text in source):
        return _cut(_tokens(tokenizer, list(source), "the texts"), samples, length, f"{len(source)} texts")
    if isinstance(source, Sequence) and not source:
        raise RecipeError("the list of calibration texts is empty: give it at least one text")
    try:
        tokens = torch.as_tensor(source).cpu()
    except (TypeError, ValueError, RuntimeError):
        raise RecipeError(
            f"a {type(source).__name__} is no calibration text: give a file, a list of texts, or token ids of equal length"
        ) from None
    return _cut(tokens, samples, length, "token ids") if tokens.dim() == 1 else Calibration(tokens)


def own_text(source: str | Path, samples: int = SAMPLES, length: int = LENGTH) -> Calibration:
    """What a model writes when it is asked nothing: for those who have no text that is like what it will read.

    A text about one subject makes a model good at that subject. SmolLM2 in GPTQ's int4_g64, calibrated on SQLite's manual alone, is
    at a KL of 0.069 on the rest of the manual and 0.232 on Moby Dick; with half of the windows its own, at 0.077 and 0.161.
    """
    from lowbit.runtime import load  # the engine, which only this needs

    model = load(source, OWN_TEXT_FORMAT, context=length + 1)
    first = model.spec.tokens.bos
    start = [first if first is not None else next(iter(model.spec.tokens.eos), 0)]
    written: list[int] = []
    plain: dict[str, Any] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
    with progress("writing a text to calibrate on", samples) as advance:
        while len(written) < samples * length:
            # Each answer has a seed of its own, so that the text is the same on every machine that rounds alike.
            answer = model.generate(start, max_new_tokens=length, seed=len(written), ignore_end=False, **plain)
            written += answer.tokens
            advance(f"{len(written)} tokens")
    return _cut(torch.tensor(written), samples, length, f"what {Path(source).name} wrote")


def joined(parts: Sequence[Calibration]) -> Calibration:
    """The windows of several texts as one calibration."""
    if len(parts) == 1:
        return parts[0]
    lengths = {part.tokens.shape[1] for part in parts}
    if len(lengths) > 1:
        raise RecipeError(f"calibration texts have windows of {sorted(lengths)} tokens: give all of them one length")
    return Calibration(torch.cat([part.tokens for part in parts]), " and ".join(part.source for part in parts))


def is_text(source: Any) -> bool:
    """Whether a source of calibration has to be cut into tokens, and brings no tokenizer for that."""
    if isinstance(source, CalibrationText):
        return source.tokenizer is None and is_text(source.source)
    texts = isinstance(source, Sequence) and bool(source) and all(isinstance(text, str) for text in source)
    return isinstance(source, str | Path) or texts


def fitting(calibration: Calibration, positions: int | None) -> Calibration:
    """Windows that are no longer than a model has positions."""
    if positions is None or calibration.tokens.shape[1] <= positions:
        return calibration
    length = calibration.tokens.shape[1]
    warnings.warn(f"calibration windows of {length} tokens are cut to the model's {positions} positions", stacklevel=3)
    return replace(calibration, tokens=calibration.tokens[:, :positions])


def _read_text(source: str | Path) -> tuple[str, str]:
    """A text and its name."""
    path = Path(source).expanduser()
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8"), str(source)
        except UnicodeDecodeError as error:
            raise RecipeError(f"{source} is no text in UTF-8 ({error.reason} at byte {error.start})") from None
    if str(source) == PILE:
        warnings.warn(
            f"the data set {PILE} lies on the hub and is not fetched: calibrated on lowbit's default text instead; "
            "give a text file or a list of texts like what the model will read",
            stacklevel=4,
        )
        return _read_text(CALIBRATING)
    if str(source) not in TEXT_NAMES:
        raise RecipeError(
            f"there is no calibration text {str(source)!r}: name a file, or one of {', '.join(TEXT_NAMES)}"
        )
    return named_text(str(source)), str(source)


def _tokens(tokenizer: Any, texts: list[str], name: str) -> torch.Tensor:
    if tokenizer is None:
        raise RecipeError(f"{name} must be cut into tokens first: pass the tokenizer of the model with it")
    if not any(text.strip() for text in texts):
        raise RecipeError(f"{name} holds no text: calibration needs some that is like what the model will read")
    with progress(f"cutting {name} into tokens"):
        return torch.tensor([i for text in texts if text.strip() for i in token_ids(tokenizer, text)])


def _cut(tokens: torch.Tensor, samples: int, length: int, name: str) -> Calibration:
    """Windows that do not overlap, spread evenly."""
    held = len(tokens) // length
    if not held:
        raise RecipeError(
            f"{name} has {len(tokens)} tokens, less than one window of {length}: "
            f"give a longer text, or a length of at most {len(tokens)}"
        )
    if held < samples:
        warnings.warn(
            f"{name} holds {held} windows of {length} tokens, less than the {samples} asked for", stacklevel=3
        )
    count = min(held, samples)
    stride = len(tokens) // count
    return Calibration(torch.stack([tokens[i * stride : i * stride + length] for i in range(count)]), name)
