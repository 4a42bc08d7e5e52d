"""What the linears of a model get, observed while somebody else runs it, and 8 bits for weights and activations from that.

    watch = Watch(model)                    hooks; the caller runs the model on what it likes
    linears = watch.summarize(0.5)          ranges after smoothing, scales of weights: plain numbers, for a file
    quantize_from_summary_(model, linears)  w8a8_static, at once or another day, from the same model or another copy of it

It is the way of those who have a loop of their own around the model; `blockwise` is the better one where the tokens are at hand,
since each block there sees what the rounded blocks before it give.

    watching    hooks and statistics        smoothing    where factors fold, and which they are
    quantizing  from a summary to a model   tuning       trying candidates until a measure is met
"""

from __future__ import annotations

from lowbit.observed.quantizing import check_summary, quantize_from_summary_
from lowbit.observed.smoothing import find_model_groups
from lowbit.observed.tuning import Candidate, Criterion, tune
from lowbit.observed.watching import Watch

__all__ = ["Candidate", "Criterion", "Watch", "check_summary", "find_model_groups", "quantize_from_summary_", "tune"]
