"""What the choice of a default rests on: the paragraph of results/default_format.md that says how far its figures carry.

Every number in it is computed from the rows that the page shows. Remarks on a run that no number says (`--remark`) are kept
with the numbers and printed as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import common
import measured_again

# What decides the figures of a row: the rounding, its search, and the recipe that is called the default.
DECIDES = (
    "src/lowbit/grid.py",
    "src/lowbit/grid_core.py",
    "src/lowbit/algorithms/rtn.py",
    "src/lowbit/recipe.py",
    "src/lowbit/formats.py",
    "src/lowbit/evaluate.py",
    "src/lowbit/search.py",
    "src/lowbit/csrc/quantize.cpp",
    "src/lowbit/csrc/quantize_lanes.h",
    "src/lowbit/csrc/fit_lanes.h",
    "src/lowbit/csrc/rounding_lanes.h",
    "assets",
)
KNOBS = (
    "the group size of the linears (32, 64, 128) and of the tied table (32 to a whole row)",
    "symmetric or with zero points, for the linears and for the table",
    "the bits of the tied table (4, 5, 6)",
    "the value projections apart (5, 6 or 8 bit), and queries, keys and values together",
    "the search of scales against plain rounding",
    "doubly quantised scales and the codebook nf4, for comparison",
)


def caveats(
    data: dict[str, Any], default: Any, rows: dict[str, Any], offered: Callable[[str], bool], budget: float
) -> str:
    """How far the figures carry, as a list."""
    lines = [
        "**Not held out.** The recipe, the weight of the search (sqrt of |w|) and its number of steps were chosen on the very "
        "windows that this page reports.",
        *_other_drafts(data, default),
        "**The tied table is flattered.** The reference model's embedding comes from the package on a Q8_0 grid, and moving "
        "it off the grid rescales its columns but leaves that grid in it: 8-bit tables look better here than on a model from "
        "training.",
        *_better_elsewhere(default, rows, offered, budget),
        "**What was varied**: "
        + "; ".join(KNOBS)
        + ". Other knobs were left where they are: bits of queries, keys, outputs "
        "and of the three projections of the MLP one by one, scales in bf16 or fp32, layers apart.",
        *_age(data),
        *data.get("remarks", ()),
    ]
    return "## How far these figures carry\n\n" + "\n".join(f"- {line}" for line in lines) + "\n"


def _other_drafts(data: dict[str, Any], default: Any) -> list[str]:
    """What the default and what is better have on drafts of the model that the choice did not see."""
    means: dict[str, list[float]] = {}
    for row in data["seeds"]:
        kls = [kl for found in row["texts"].values() for kl in found["windows_kl"]]
        means.setdefault(row["name"], []).append(sum(kls) / len(kls))
    mean = {name: sum(values) / len(values) for name, values in means.items()}
    if default.name not in mean:
        return []
    better = sorted((value, name) for name, value in mean.items() if value < mean[default.name])
    others = "; ".join(f"{name} {value:.3f}" for value, name in better) or "none of those measured is better"
    count = len({row["seed"] for row in data["seeds"]})
    return [
        f"**On {count} other drafts of the model** the default has KL {mean[default.name]:.3f} (here {default.kl:.3f}). Better "
        f"there: {others}."
    ]


def _better_elsewhere(default: Any, rows: dict[str, Any], offered: Callable[[str], bool], budget: float) -> list[str]:
    """Rows within the budget that beat the default and that it may not be."""
    better = [row for row in rows.values() if row.bits <= budget and row.kl < default.kl and not offered(row.name)]
    named = "; ".join(
        f"{row.name}: KL {row.kl:.3f} at {row.bits:.3f} bits" for row in sorted(better, key=lambda row: row.kl)
    )
    return [
        "**Better at the same size, and not the default**: the default is chosen among recipes that compressed-tensors can hold, "
        f"so that other programs read what it makes. {named}. `Recipe(...)` and `--format`, `--override` make these too, "
        "in lowbit's own form."
    ] * bool(better)


def _age(data: dict[str, Any]) -> list[str]:
    """What has changed in the tree since the rows were measured, as git knows it, and what measuring again said."""
    commit = common.bare_commit(data["machine"])
    changed = common.changed_since(commit, DECIDES)
    if not changed:
        return []
    return [
        f"**Age.** Of what decides a row, these files have changed since {commit}: {common.code_names(changed)}. "
        + measured_again.verdict(data, DECIDES)
    ]
