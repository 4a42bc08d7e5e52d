"""Algorithms: plain functions that choose codes and scales. They know nothing of files, devices or families.

One row for each; their options have a row of the same name in `lowbit.options`.
"""

from __future__ import annotations

from lowbit.algorithms.autoround import round_in_block, round_rest
from lowbit.algorithms.awq import scale_by_awq_
from lowbit.algorithms.gptq import round_gptq
from lowbit.algorithms.hqq import round_half_quadratic
from lowbit.algorithms.rtn import round_clipped, round_plain, round_to_nearest
from lowbit.algorithms.smoothquant import scale_by_smoothquant_
from lowbit.algorithms.table import Rounder, Scaler
from lowbit.algorithms.teq import scale_by_teq_

ROUNDERS: dict[str, Rounder] = {
    "rtn": Rounder(round_to_nearest),
    "plain_rtn": Rounder(round_plain),
    "clip_rtn": Rounder(round_clipped),
    "hqq": Rounder(round_half_quadratic),
    "gptq": Rounder(round_gptq, hessian=True, full=lambda options: options.correction > 0),
    "autoround": Rounder(round_rest, round_in_block, full=lambda options: True),
}
SCALERS: dict[str, Scaler] = {
    "awq": Scaler(scale_by_awq_),
    "smoothquant": Scaler(scale_by_smoothquant_),
    "teq": Scaler(scale_by_teq_),
}
