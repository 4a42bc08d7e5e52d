"""Algorithms: plain functions that choose codes and scales. They know nothing of files, devices or families.

One row for each; their options have a row of the same name in `lowbit.options`.
"""

from __future__ import annotations

from lowbit.algorithms.gptq import round_gptq
from lowbit.algorithms.rtn import round_plain, round_to_nearest
from lowbit.algorithms.table import Rounder, Scaler

ROUNDERS: dict[str, Rounder] = {
    "rtn": Rounder(round_to_nearest),
    "plain_rtn": Rounder(round_plain),
    "gptq": Rounder(round_gptq, hessian=True, full=lambda options: options.correction > 0),
}
SCALERS: dict[str, Scaler] = {}
